"""Every tolerance of the test suite, stated once. All are for float32 on a CPU.

Where a test asks for bit equality it uses ``torch.equal`` or ``==`` and none of these.
"""

SUM = 1e-5  # relative: the same sums added up in another order (packing, padding, accumulation, ranks)
LOGITS = 1e-4  # absolute: scores of words from a cache and without one
PIXELS = 1e-4  # absolute: a picture in [-1, 1] drawn alone and beside others (a grey level is 8e-3)
ATTENTION = 1e-5  # absolute: outputs of two attention back ends
ATTENTION_GRADIENT = 1e-4  # absolute: their gradients
PARAMETERS = 1e-5  # absolute: parameters after a few optimizer steps along two equivalent ways
LOSS_CURVE = 1e-6  # relative: losses of equivalent runs (one process, two processes)
GOLDEN = 1e-3  # relative: a 20-step loss curve on another processor or version of torch
