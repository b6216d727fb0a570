"""What leaves the project: trained models and autoencoders in formats that other libraries read."""
