"""The resources that a study requests from a cluster, and the cost of a study."""
