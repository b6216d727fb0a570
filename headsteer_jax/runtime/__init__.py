"""The ground that the other rooms stand on: hosts, devices, files, checkpoints, interruptions and progress."""
