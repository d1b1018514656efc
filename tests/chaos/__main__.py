"""See tests.chaos.table."""

import os
import sys

# Inherited by every process that is started. One that names itself would else write over its environment, by which it
# is found.
os.environ |= {"SPT_NOENV": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

from tests.chaos.table import main

if __name__ == "__main__":
    sys.exit(main())
