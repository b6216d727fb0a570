"""Export of trained models and autoencoders to formats that other libraries read."""
