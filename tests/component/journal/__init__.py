"""The journal: its files, its writer, its reader, and disks that refuse."""
