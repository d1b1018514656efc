"""The control process of ``remuda serve``: that of cluster.control, with the doctor's measurement of links for
placement, and its quick part before ranks start."""

import sys

from cluster.control.launch import main
from cluster.doctor.host_links import measure_host_links
from cluster.doctor.quick import examine_quickly

if __name__ == "__main__":
    sys.exit(main(examine_quickly, measure_host_links))
