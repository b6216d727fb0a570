"""The basis of the other rooms: hosts, devices, files, checkpoints, interruptions and progress."""
