"""The command line `batchcam`."""
