"""What outlives a process: files, journals, fingerprints, random streams."""
