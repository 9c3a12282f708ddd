"""mmcv's operators on torchvision: through mmcv's own functions, against torchvision and finite differences."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from core.config.mmcv_ops import MissingOperator, register

ROOT = Path(__file__).resolve().parents[2]


def boxes(count, size=60.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * size
    return torch.cat([corner, corner + 3 + torch.rand(count, 2, generator=generator) * size / 3], dim=1)


def rois():
    # Inside, over the border, outside, thinner than a bin, in the second image.
    return torch.tensor(
        [[0, 4.3, 2.1, 30.7, 41.0], [0, -9.0, -5.0, 20.0, 12.5], [1, 60.0, 60.0, 90.0, 80.0], [1, 7.2, 9.9, 7.9, 31.0]]
    )


def test_nms_keeps_what_torchvision_keeps_best_first():
    from mmcv.ops import nms

    found, scores = boxes(80), torch.rand(80)
    detections, kept = nms(found, scores, iou_threshold=0.4)
    assert torch.equal(kept, torchvision.ops.nms(found, scores, 0.4))
    assert 1 < len(kept) < 80
    assert torch.equal(detections[:, :4], found[kept]) and torch.equal(detections[:, 4], scores[kept])
    assert (detections[1:, 4] <= detections[:-1, 4]).all()


def test_nms_with_score_threshold_and_limit():
    from mmcv.ops import nms

    found, scores = boxes(80), torch.rand(80)
    detections, kept = nms(found, scores, iou_threshold=0.4, score_threshold=0.5, max_num=3)
    assert len(kept) == 3 and (scores[kept] > 0.5).all()
    assert torch.equal(detections[:, 4], scores[kept])


def test_nms_offset_counts_pixels():
    from mmcv.ops import nms

    # 9 of 11 columns in common when measured, 10 of 12 when counted: 0.818 and 0.833.
    pair = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0]])
    scores = torch.tensor([0.9, 0.8])
    assert len(nms(pair, scores, iou_threshold=0.825, offset=0)[1]) == 2
    assert len(nms(pair, scores, iou_threshold=0.825, offset=1)[1]) == 1


def test_nms_per_class_of_nothing_and_of_half_precision():
    from mmcv.ops import batched_nms

    same = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 3)
    scores = torch.tensor([0.3, 0.9, 0.5])
    _, kept = batched_nms(same, scores, torch.tensor([0, 0, 1]), {"iou_threshold": 0.5})
    assert kept.tolist() == [1, 2]
    detections, kept = batched_nms(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.long), None)
    assert detections.shape == (0, 5) and kept.shape == (0,)
    _, kept = batched_nms(same.bfloat16(), scores.bfloat16(), torch.tensor([0, 0, 1]), {"iou_threshold": 0.5})
    assert kept.tolist() == [1, 2]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_roi_align_is_torchvisions_forward_and_backward(aligned, sampling_ratio, scale):
    from mmcv.ops import RoIAlign

    ours = torch.randn(2, 3, 24, 20, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    out = RoIAlign((5, 7), scale, sampling_ratio, aligned=aligned)(ours, rois())
    expected = torchvision.ops.roi_align(theirs, rois(), (5, 7), scale, sampling_ratio, aligned)
    torch.testing.assert_close(out, expected)
    assert out.abs().sum() > 0
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.abs().sum() > 0


def test_roi_align_gradient_by_finite_differences():
    from mmcv.ops import roi_align

    features = torch.randn(2, 2, 8, 7)
    weights = torch.randn(4, 2, 3, 3)

    def value(x):
        return (roi_align(x, rois(), (3, 3), 0.2, 2, "avg", True) * weights).sum()

    features.requires_grad_()
    (gradient,) = torch.autograd.grad(value(features), features)
    with torch.no_grad():
        for place in [(0, 0, 1, 1), (0, 1, 4, 5), (1, 1, 3, 1), (0, 0, 0, 0), (1, 0, 7, 6)]:
            step = torch.zeros_like(features)
            step[place] = 0.5  # the operator is linear: any step gives the exact difference
            numeric = value(features + step) - value(features - step)
            torch.testing.assert_close(gradient[place], numeric, rtol=1e-3, atol=1e-4)
    assert gradient.count_nonzero() > 50


def test_roi_align_in_half_precision_samples_in_float32():
    from mmcv.ops import RoIAlign

    features = torch.randn(2, 3, 24, 20)
    layer = RoIAlign((5, 5), 0.5, 2)
    half = layer(features.bfloat16().requires_grad_(), rois())
    assert half.dtype == torch.bfloat16
    exact = layer(features.bfloat16().float(), rois())
    assert torch.equal(half, exact.bfloat16())


def test_max_pooled_rois_and_other_operators_say_what_is_missing():
    from mmcv.ops import DeformConv2d, RoIAlign, box_iou_rotated, soft_nms

    with pytest.raises(MissingOperator, match="pool_mode='avg'"):
        RoIAlign((5, 5), pool_mode="max")(torch.randn(2, 3, 8, 8), rois())
    with pytest.raises(MissingOperator, match=r"'softnms'.*offers nms, roi_align_forward"):
        soft_nms(boxes(4), torch.rand(4))
    with pytest.raises(MissingOperator, match="'box_iou_rotated'"):
        box_iou_rotated(torch.rand(2, 5), torch.rand(2, 5))
    with pytest.raises(MissingOperator, match="'deform_conv_forward'"):
        DeformConv2d(2, 2, 3)(torch.randn(1, 2, 5, 5), torch.randn(1, 18, 3, 3))


def test_focal_loss_is_mmdets_formula_with_its_gradient():
    from mmcv.ops import sigmoid_focal_loss
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss

    logits = (3 * torch.randn(7, 4)).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4, 4, 0])  # 4: background
    loss = sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    one_hot = torch.nn.functional.one_hot(target, 5)[:, :4]
    expected = py_sigmoid_focal_loss(logits, one_hot, reduction="none")
    torch.testing.assert_close(loss, expected)
    for gamma, alpha in ((2.0, 0.25), (1.5, 0.6)):
        (ours,) = torch.autograd.grad(sigmoid_focal_loss(logits, target, gamma, alpha, None, "sum"), logits)
        reference = py_sigmoid_focal_loss(logits, one_hot, gamma=gamma, alpha=alpha, reduction="sum")
        torch.testing.assert_close(ours, torch.autograd.grad(reference, logits)[0])


def test_focal_loss_weighs_classes_and_stays_finite():
    from mmcv.ops import sigmoid_focal_loss

    target = torch.tensor([0, 1, 2])
    logits = torch.tensor([[90.0, -90.0], [-300.0, 300.0], [200.0, 0.0]], requires_grad=True)
    weight = torch.tensor([3.0, 0.5])
    plain = sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    weighted = sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "none")
    torch.testing.assert_close(weighted, plain * torch.tensor([[3.0], [0.5], [1.0]]))
    weighted.sum().backward()
    assert weighted.isfinite().all() and logits.grad.isfinite().all()


def test_a_real_extension_is_left_alone_and_the_stand_in_has_no_dunder_names(monkeypatch):
    extension = sys.modules["mmcv._ext"]
    assert not hasattr(extension, "__wrapped__")
    marker = object()
    monkeypatch.setitem(sys.modules, "mmcv._ext", marker)
    register()
    assert sys.modules["mmcv._ext"] is marker


@pytest.mark.child
def test_mmdet_imports_as_a_whole_in_a_fresh_process():
    code = (
        "import core.config.mmcv_ops\n"
        "from mmdet.utils import register_all_modules\n"
        "register_all_modules(init_default_scope=False)\n"
        "from mmdet.registry import MODELS\n"
        "print(all(MODELS.get(n) for n in ('MaskRCNN', 'CascadeRCNN', 'RetinaNet', 'FPN', 'SwinTransformer')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "True", done.stderr[-2000:]
