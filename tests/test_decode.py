"""The decoder of one position gives what the model gives, for every architecture, and steps aside for parts it does not know."""
import dataclasses

import pytest
import torch

from minimoe.attention import KVCache
from minimoe.decode import Decoder, lay_out_for_decoding
from minimoe.model import MoETransformer
from tests.test_model import BASE, CONFIGS, model_and_tokens

MORE = CONFIGS | {
    "softmax with bias": dataclasses.replace(BASE, balance="bias", norm_topk=False),
    "biases, full norm": dataclasses.replace(BASE, qkv_bias=True, qk_norm="full"),
}


def biased(model: MoETransformer) -> MoETransformer:
    """With biases and norms that are not zero and one, as after training."""
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.dim() == 1 or name.endswith("bias_E"):
                p.add_(torch.randn(p.shape) * 0.3)
    return model


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("batch", [1, 3])                   # two pairs for four experts, then more pairs than experts
@pytest.mark.parametrize("laid_out", [False, True])
def test_the_decoder_equals_the_model(name, batch, laid_out):
    model, tokens = model_and_tokens(MORE[name], b=batch)
    model = biased(model)
    want = model(tokens).logits
    if laid_out:
        lay_out_for_decoding(model)
        assert torch.allclose(model(tokens).logits, want, atol=1e-5)
    decode, cache = Decoder(model), KVCache(model.cfg, batch)
    assert decode.own
    with torch.inference_mode():
        model(tokens[:, :4], cache=cache)
        for t in range(4, 11):
            assert torch.allclose(decode(tokens[:, t], cache), want[:, t], atol=1e-4)
    assert cache.lengths == [11] * batch


def test_q_k_and_v_laid_out_for_decoding_are_one_matrix_without_a_copy():
    model = lay_out_for_decoding(MoETransformer(BASE))
    attention, w_DX = model.blocks[0].attention, Decoder(model).layers[0].qkv_DX
    assert w_DX.data_ptr() == attention.q.weight.data_ptr()
    assert torch.equal(w_DX, torch.cat([p.weight.t() for p in (attention.q, attention.k, attention.v)], dim=1))


def test_sequences_of_different_lengths_go_through_the_model():
    model, tokens = model_and_tokens(BASE)
    caches = [KVCache(model.cfg, 3) for _ in range(2)]
    for cache in caches:
        model(tokens[:, :5], cache=cache, lengths=[5, 2, 4])
    assert torch.equal(Decoder(model)(tokens[:, 5], caches[0]), model(tokens[:, 5:6], cache=caches[1]).logits[:, 0])


def test_a_part_of_somebody_else_is_called_and_not_read():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, tokens = model_and_tokens(BASE)
    for block in model.blocks:
        block.attention.o.__class__ = Doubled
    decode, cache = Decoder(model), KVCache(model.cfg, 3)
    assert not decode.own
    model(tokens[:, :5], cache=cache)
    assert torch.allclose(decode(tokens[:, 5], cache), model(tokens[:, :6]).logits[:, 5], atol=1e-4)
