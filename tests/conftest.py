"""What all tests have: no times that were measured before, and none that outlive them."""

import os

os.environ["SPARSE_NAS_MEASURED"] = "off"  # of processes that tests start, too
