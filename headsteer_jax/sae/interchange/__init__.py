"""Autoencoders in the files of other libraries: SAELens, overcomplete, dictionary_learning and sparsify."""
