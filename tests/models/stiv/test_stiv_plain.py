"""The transformer equals the formulas of the reference, written as loops over one clip without shared code."""

from __future__ import annotations

import math

import pytest
import torch

from lumos.models.stiv.modeling import Micro


def plain(model, latents, t, text, pooled, micro, given=None, given_time=1.0, keep=None):
    """Return the velocity [T, C, h, w] of one clip. latents [T, C, h, w], text [m, e], pooled [e], micro: lists of numbers."""
    w, c = {name: value.double() for name, value in model.state_dict().items()}, model.config
    p, pt, heads, d = c.patch_size, c.temporal_patch_size, c.num_attention_heads, c.hidden_size

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def silu(x):
        return x / (1 + torch.exp(-x))

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def sines(values):
        parts = []
        for value in values:
            angles = torch.tensor([value * 10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
            parts += [angles.cos(), angles.sin()]
        return torch.cat(parts)

    def turned(x, angles):  # x [n, 64], angles [n, 32]
        a, b = x[:, :32], x[:, 32:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    def attention(name, x, source, angles=None, causal=False):
        out = []
        q, k, v = linear(f"{name}.q_proj", x), linear(f"{name}.k_proj", source), linear(f"{name}.v_proj", source)
        for h in range(heads):
            parts = [part[:, 64 * h : 64 * h + 64] for part in (q, k, v)]
            for i, which in enumerate("qk"):
                rms = (parts[i].square().mean(-1, keepdim=True) + 1e-6).sqrt()
                parts[i] = parts[i] / rms * w[f"{name}.{which}_norm.weight"]
                if angles is not None:
                    parts[i] = turned(parts[i], angles)
            scores = parts[0] @ parts[1].T / 8
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
            out.append(scores.softmax(-1) @ parts[2])
        return linear(f"{name}.o_proj", torch.cat(out, dim=-1))

    frames, rows, columns = len(latents) // pt, latents.shape[2] // p, latents.shape[3] // p
    scale = c.position_scale

    def turns(position, channels):
        return torch.tensor([position * 10_000 ** (-2 * i / channels) for i in range(channels // 2)], dtype=torch.float64)

    place_angles = torch.stack([torch.cat([turns(r * scale["rows"], 32), turns(k * scale["columns"], 32)])
                                for r in range(rows) for k in range(columns)])  # fmt: skip
    time_angles = torch.stack([turns(f * scale["time"], 64) for f in range(frames)])

    clean = [given is not None and c.given_time == "clean" and all(given[f * pt : f * pt + pt]) for f in range(frames)]
    summed = []
    for f in range(frames):
        of = {"time": [1000 * (given_time if clean[f] else t)], **micro}
        total = norm(linear("conditions.text", pooled))
        for name, values in of.items():
            total = total + norm(linear(f"conditions.{name}.2", silu(linear(f"conditions.{name}.0", sines(values)))))
        summed.append(silu(total))
    words = linear("text_in.2", gelu(linear("text_in.0", text)))

    tokens = torch.stack([
        torch.stack([latents[f * pt : f * pt + pt, :, r * p : r * p + p, k * p : k * p + p].reshape(-1)
                     for r in range(rows) for k in range(columns)]) for f in range(frames)
    ])  # fmt: skip
    x = linear("patch_in", tokens)  # [f, s, d]
    seen = list(range(rows * columns)) if keep is None else keep
    x = x[:, seen]
    for i in range(c.num_hidden_layers):
        if keep is not None and i == c.num_hidden_layers - c.unmasked_layers:
            whole = w["mask_token"].expand(frames, rows * columns, d).clone()
            whole[:, seen], x, seen = x, whole, list(range(rows * columns))
            x = whole
        block = f"blocks.{i}"
        parts = [linear("modulation", one).view(6, d) + (w[f"{block}.table"] if c.adaln_table else 0) for one in summed]
        inner = [norm(x[f]) * (1 + m[1]) + m[0] for f, m in enumerate(parts)]
        x = torch.stack([x[f] + m[2] * norm(attention(f"{block}.spatial", inner[f], inner[f], place_angles[seen]))
                         for f, m in enumerate(parts)])  # fmt: skip
        if c.temporal_attention:
            columns_ = [norm(attention(f"{block}.temporal", *[norm(x[:, s])] * 2, time_angles, c.causal_in_time))
                        for s in range(x.shape[1])]  # fmt: skip
            x = x + w[f"{block}.temporal_gain"] * torch.stack(columns_, dim=1)
        x = x + attention(f"{block}.cross", x.flatten(0, 1), words).view(x.shape)
        wide = [gelu(linear(f"{block}.mlp.up_proj", norm(x[f]) * (1 + m[4]) + m[3])) for f, m in enumerate(parts)]
        x = torch.stack([x[f] + m[5] * norm(linear(f"{block}.mlp.down_proj", wide[f])) for f, m in enumerate(parts)])
    out = torch.empty_like(latents)
    for f in range(frames):
        shift, gain = linear("final_modulation", summed[f]).view(2, d)
        values = linear("patch_out", norm(x[f]) * (1 + gain) + shift).view(rows, columns, pt, c.latent_channels, p, p)
        for r in range(rows):
            for k in range(columns):
                out[f * pt : f * pt + pt, :, r * p : r * p + p, k * p : k * p + p] = values[r, k]
    return out


CASES = {
    "video": {},
    "pictures": {"temporal_attention": False},
    "two frames a token": {"temporal_patch_size": 2},
    "causal, no table, heads": {"causal_in_time": True, "adaln_table": False, "hidden_size": 128},
    "one time, scaled": {"given_time": "same", "position_scale": {"time": 0.5, "rows": 0.25, "columns": 0.75}},
}


@pytest.mark.parametrize("places", [None, [[0, 3, 5], [1, 2, 4]]])
@pytest.mark.parametrize("case", CASES)
def test_the_transformer_is_that_of_the_reference(micro_stiv, case, places):
    model = micro_stiv(**CASES[case]).double()
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 4, 6, generator=draws, dtype=torch.float64)
    text, pooled = (torch.randn(*shape, 64, generator=draws, dtype=torch.float64) for shape in ((2, 5), (2,)))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    t, given = torch.tensor([0.3, 0.8], dtype=torch.float64), torch.tensor([[True, True, False, True], [False] * 4])
    micro = {"original_size": [[360, 640], [48, 32]], "crop": [[3, 7], [0, 0]], "stride": [[3], [1]], "num_frames": [[17], [4]]}
    facts = Micro(*(torch.tensor(values).squeeze(-1) for values in micro.values()))
    found = model(x, t, text, mask, pooled, given=given, given_time=0.9, micro=facts,
                  keep=None if places is None else torch.tensor(places)).sample  # fmt: skip
    for i in range(2):
        wanted = plain(
            model, x[i], float(t[i]), text[i][mask[i]], pooled[i], {name: values[i] for name, values in micro.items()},
            given[i].tolist(), 0.9, None if places is None else places[i],
        )  # fmt: skip
        assert torch.allclose(found[i].double(), wanted, atol=2e-4, rtol=1e-4)
