"""What all jobs share: records that survive a kill, where they were taken, timing, data."""
