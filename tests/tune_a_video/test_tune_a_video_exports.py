"""A record serves one video and many; `tests/test_model_contract.py` has the other exports of the video network."""

import pytest

from tests.exported import check
from tests.tune_a_video.subjects import inputs, network, sample


@pytest.mark.parametrize(("made", "asked"), [(1, 3), (2, 1)])
def test_a_record_serves_one_video_and_many(made, asked, tmp_path) -> None:
    check("trace", network()().eval(), inputs(2), tmp_path, call=sample, made=made, asked=asked)
