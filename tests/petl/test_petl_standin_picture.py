"""The picture of cue swap."""

import numpy as np
import pytest
from PIL import Image

from petl.standin.picture import main, world_page


def test_the_page_shows_both_domains_and_frames_what_counts(tmp_path):
    page = world_page(count=3, scale=2)
    assert page.size == (3 * 70 + 6, 2 * 70 + 6)
    pixels = np.asarray(page)
    rows = pixels[6:70], pixels[76:140]
    assert not np.array_equal(*rows)
    main([str(tmp_path / "world.png")])
    assert Image.open(tmp_path / "world.png").size == world_page().size
    with pytest.raises(SystemExit, match="usage"):
        main([])
