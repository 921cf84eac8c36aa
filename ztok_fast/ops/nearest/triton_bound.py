"""How far a score of the tensor-core scan may be from the exact one; plain Python, so that tests can check it."""

# A bfloat16 has 8 significant bits: rounding to it loses at most 2^-9 of a number, a second term of the rest 2^-18.
SPLIT = 2.0**-18
# A tensor core multiplies exactly, adds STEP products to the running sum at once, and aligns them to the largest of
# them with at least one guard bit; at worst it loses two units of the last place of the running sum per step (Fasi,
# Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021).
STEP = 16
ULP = 2.0**-23
# offset, its subtraction, the lengths of row and code, each rounded to float32
FIXED_ULPS = 16


def error_bound(width: int, row_terms: int, code_terms: int) -> float:
    """Bound of |score - exact score| / (|c|max (|x| + |c|max)) for rows and codes cut into so many terms.

    One term means that the input has it exactly (bfloat16, or float16 against float16). Two terms of float16 codes are
    exact as well, but are counted as if they were not.
    """
    both = row_terms == 2 and code_terms == 2
    # what the second term of either side leaves out, and the product of the two second terms, which is not made
    lost = SPLIT * ((row_terms == 2) + (code_terms == 2) + both)
    products = row_terms + code_terms - 1
    steps = -(-width // STEP) * products
    return lost * 1.01 + ULP * (2 * steps + FIXED_ULPS)
