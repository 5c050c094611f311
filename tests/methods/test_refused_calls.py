"""A call that is refused changes nothing."""

import math
import re
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from starfire_prune.methods.baselines import (
    magnitude_unstructured,
)
from tests.support.methods import (
    BLOCK,
    CK,
    FINE,
    INTRA,
    MAGNITUDE,
    WINDOW,
    Method,
    assert_refused,
    conv,
    every_method,
    every_ranking_method,
    every_state,
    leave,
    linear,
    prune,
    prune_by_another,
    zeros,
)

BAD_AMOUNTS = [
    *[(-0.1, ValueError), (1.5, ValueError), (math.nan, ValueError), (-1, ValueError)],
    *[(10**6, ValueError), ("0.5", TypeError), (True, TypeError), (None, TypeError)],
]


@every_state
@every_method
def test_bad_amounts_are_refused(row, state):
    module = state(row, row.module())
    for amount, error in BAD_AMOUNTS:
        if row is INTRA and isinstance(amount, int):
            error = TypeError  # it takes shares alone
        match = rf"^{type(module).__name__}\.weight: `amount` \(={re.escape(repr(amount))}\)"
        assert_refused(module, partial(row.prune, amount=amount), error, match)


@every_method
def test_an_amount_must_be_given(row):
    assert_refused(row.module(), row.function, TypeError, r"`amount` \(=None\) must be a float")


@every_state
@every_method
def test_what_fails_inside_of_a_method_changes_nothing(row, state, monkeypatch):
    module = state(row, row.module())
    call = partial(row.prune, amount=row.more)
    monkeypatch.setattr(row.method, "compute_mask", Mock(side_effect=RuntimeError("no mask today")))
    assert_refused(module, call, RuntimeError, "no mask today")
    monkeypatch.setattr(row.method, "compute_mask", Mock(return_value=torch.ones(2, 7).bool()))
    assert_refused(module, call, RuntimeError, r"size of tensor|shape")


@every_state
@every_method
def test_unknown_options_are_refused(row, state):
    module = state(row, row.module())
    apply = partial(row.method.apply, name="weight", amount=row.more, colour="blue")
    assert_refused(module, apply, TypeError, "colour")


@every_state
@every_ranking_method
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(row, state, value):
    module = state(row, row.module())
    weight = module._parameters.get("weight_orig", module._parameters.get("weight"))
    assert weight is not None
    first_kept = module.weight.detach().flatten().nonzero()[0]
    with torch.no_grad():
        weight.view(-1)[first_kept] = value
    assert_refused(
        module, partial(row.prune, amount=row.more), ValueError, r"\.weight: .*not finite"
    )


@every_state
@every_ranking_method
def test_scores_that_are_not_finite_are_refused(row, state):
    module = state(row, row.module())
    scores = torch.full_like(module.weight.detach(), math.nan)
    call = partial(row.prune, amount=row.more, importance_scores=scores)
    assert_refused(module, call, ValueError, r"\.weight: .*not finite")


@every_state
@every_ranking_method
def test_scores_of_another_shape_are_refused(row, state):
    module = state(row, row.module())
    scores = module.weight.detach()[:1]
    shapes = [re.escape(str(tuple(tensor.shape))) for tensor in (scores, module.weight)]
    call = partial(row.prune, amount=row.more, importance_scores=scores)
    assert_refused(module, call, ValueError, f"`importance_scores` of shape {'.*'.join(shapes)}")


@every_state
@every_ranking_method
def test_scores_that_are_no_tensor_are_refused(row, state):
    module = state(row, row.module())
    scores = module.weight.detach().numpy()
    call = partial(row.prune, amount=row.more, importance_scores=scores)
    assert_refused(module, call, TypeError, "`importance_scores` must be a tensor.*ndarray")


@every_state
@every_method
def test_names_that_the_module_does_not_have_are_refused(row, state):
    module = state(row, row.module())
    names = "(weight, bias|bias, weight)$"  # built-in methods change the order
    match = rf"{type(module).__name__} has no parameter `wieght`; it has: {names}"
    assert_refused(module, partial(row.prune, name="wieght"), AttributeError, match)


@every_state
@every_method
def test_an_amount_in_the_names_place_is_refused(row, state):
    module = state(row, row.module())
    match = r"`name` \(=0\.6\) must be a str; the amount is the argument `amount`"
    assert_refused(module, lambda module: row.function(module, 0.6), TypeError, match)


@pytest.mark.parametrize("state", [leave, prune_by_another])
@pytest.mark.parametrize(
    ("row", "factory", "match"),
    [
        (WINDOW, partial(nn.Conv2d, 4, 10, 1), r"Conv2d\.weight: window pruning .*1x1.*by ck"),
        (WINDOW, linear, r"Linear\.weight: .*\(K, C, \*kernel\)"),
        (
            CK,
            partial(nn.Conv2d, 4, 4, 3, groups=4),
            r"Conv2d\.weight: .*depthwise.*scope=\"layer\"",
        ),
        (CK, linear, r"Linear\.weight: .*\(K, C, \*kernel\).*; for linear layers .* fc_fine"),
        (INTRA, partial(nn.Conv2d, 4, 4, 3, groups=4), r"depthwise.*scope=\"layer\""),
        (INTRA, linear, r"Linear\.weight: .*\(K, C, \*kernel\)"),
        (BLOCK, conv, r"Conv2d\.weight: .*fc methods are for linear layers; .* ck_structured"),
        (FINE, conv, r"Conv2d\.weight: .*fc methods are for linear layers"),
    ],
    ids=lambda value: value.function.__name__ if isinstance(value, Method) else "",
)
def test_modules_that_do_not_fit_are_refused(row, factory, match, state):
    assert_refused(state(row, factory()), row.prune, ValueError, match)


TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


@every_method
@pytest.mark.parametrize("kind", TRANSPOSED)
def test_transposed_convolutions_are_refused(row, kind):
    module = kind(4, 6, 3)
    match = f"{kind.__name__} is a transposed convolution"
    assert_refused(module, row.prune, TypeError, match)
    prune.l1_unstructured(module, "weight", amount=0.1)
    assert_refused(module, row.prune, TypeError, match)


@every_method
def test_reparametrised_weights_are_refused(row):
    module = weight_norm(row.module())
    assert_refused(module, row.prune, AttributeError, "has no parameter `weight`; it has: bias")


@every_method
def test_spectral_norm_by_hook_is_refused(row):
    module = nn.utils.spectral_norm(row.module())
    match = "computes `weight` from `weight_orig`, as spectral_norm does"
    assert_refused(module, row.prune, ValueError, match)


@every_method
def test_complex_weights_are_refused(row):
    module = row.module()
    module.weight = nn.Parameter(module.weight.detach().to(torch.complex64))
    match = "^`weight` of .* has dtype torch.complex64, and only real weights are ranked$"
    assert_refused(module, row.prune, TypeError, match)


@pytest.mark.parametrize("row", [FINE, BLOCK, MAGNITUDE])
def test_the_projection_of_torchs_attention_is_refused(row):
    match = "is the output projection of nn.MultiheadAttention, which uses its weight without"
    assert_refused(nn.MultiheadAttention(16, 2).out_proj, row.prune, TypeError, match)


@pytest.mark.parametrize("row", [CK, WINDOW, INTRA])
@pytest.mark.parametrize("module", [nn.Bilinear(8, 8, 8), nn.LayerNorm([8, 8, 8])])
def test_weights_without_kernels_are_refused(row, module):
    match = f"^{type(module).__name__} is not a convolution, and its `weight` has no kernels: mag"
    assert_refused(module, row.prune, TypeError, match)


@pytest.mark.parametrize("taken", ["weight_orig", "weight_mask"])
@pytest.mark.parametrize("value", [nn.Parameter(torch.ones(3)), nn.Buffer(torch.ones(3)), 3])
def test_names_that_are_taken_are_refused(taken, value):
    module = conv()
    setattr(module, taken, value)
    match = f"the module has a `{taken}` already, which pruning `weight` adds"
    assert_refused(module, MAGNITUDE.prune, ValueError, match)


@every_method
def test_parameters_that_are_none_are_refused(row):
    module = row.module(bias=False)
    match = "has no parameter `bias`; it has: weight$"
    assert_refused(module, partial(row.prune, name="bias"), AttributeError, match)


def test_a_module_without_parameters_is_refused():
    match = "ReLU has no parameter `weight`; it has: none of its own"
    assert_refused(nn.ReLU(), MAGNITUDE.prune, AttributeError, match)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_parameters_without_values_are_refused():
    module = nn.LazyConv2d(10, 3)
    with pytest.raises(ValueError, match="`weight` of LazyConv2d has no values yet: run a forward"):
        CK.prune(module)
    module(torch.randn(2, 4, 5, 5))
    assert zeros(CK.prune(module)) == CK.zeros


def test_a_refused_call_leaves_recurrent_weights_in_place():
    module = nn.LSTM(6, 5)
    call = partial(magnitude_unstructured, name="weight_ih_l0", amount=1.5)
    for _ in range(2):
        assert_refused(module, call, ValueError, r"LSTM\.weight_ih_l0: `amount` \(=1.5\)")
        magnitude_unstructured(module, "weight_ih_l0", 0.5)
