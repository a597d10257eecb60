"""From the lanes' sums to a result in host memory."""
