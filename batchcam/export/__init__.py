"""A trained model as files: a bundle, its model card, and formats that others read."""
