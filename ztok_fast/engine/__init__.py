"""Inference with the same bits everywhere: whatever the batch, the chunking, the threads and the instruction set."""
