"""What all tests have: no times measured before, none that outlive them; interrupts are heard."""

import os
import signal

os.environ["SPARSE_NAS_MEASURED"] = "off"  # of processes that tests start, too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
