"""Data sets on disk as papers use them: ADE20K, clips of videos; and the preparation of drawn ones."""
