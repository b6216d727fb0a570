"""From the sweep's counts to what may be claimed: statistics, headline numbers, layers, the sweep's file."""
