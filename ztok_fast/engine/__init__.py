"""Inference with the same bits everywhere: whatever the batch, the chunking, the threads and the instruction set."""

from ztok_fast.engine.architecture import EngineUnsupported
from ztok_fast.engine.draft import Texts, Written, write_blocks, write_steps, write_told
from ztok_fast.engine.engine import Engine
from ztok_fast.engine.sequences import Sequences

__all__ = ["Engine", "EngineUnsupported", "Sequences", "Texts", "Written", "write_blocks", "write_steps", "write_told"]
