"""The indexing shell: corpus -> passages -> vectors -> index, and the training set of stage 1. Uses Ray Data."""
