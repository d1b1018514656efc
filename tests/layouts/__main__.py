"""See tests.layouts.table."""

import os
import sys

# Before torch is imported, here and in every rank. Its store's notices of addresses without names are no news.
os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}

from tests.layouts.table import main

if __name__ == "__main__":
    sys.exit(main())
