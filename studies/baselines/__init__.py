"""What Batch-CAM is compared with: other ways to have CAMs in training. Only comparisons use it."""
