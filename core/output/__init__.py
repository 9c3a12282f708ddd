"""What people look at: tables as text, images and clips, progress, and the files that log backends write."""
