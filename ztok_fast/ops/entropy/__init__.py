"""Entropy coding: intervals of symbols from logits or tables, and a range coder of many streams."""
