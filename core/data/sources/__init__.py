"""Readers of what is on disk: folders, archives, images, videos, lists."""
