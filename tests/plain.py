"""The model and its losses once more, from their definitions: a loop over layers and experts, no scan, sorting or sharding."""

import jax
import jax.numpy as jnp
import numpy as np


def is_mixture(cfg, layer):
    after = layer - cfg.first_dense
    return bool(cfg.n_experts) and after >= 0 and after % cfg.moe_every == cfg.moe_every - 1


def norm(x, scale, eps):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def turned(x, positions, theta):
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * theta ** (-jnp.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], axis=-1)


def attention(cfg, weights, x, batch):
    q, k, v = (jnp.einsum("bsd,dnh->bsnh", x, weights[name]) for name in "qkv")
    if cfg.qk_norm:
        q, k = (norm(w, weights[f"norm_{name}"], cfg.norm_eps) for w, name in ((q, "q"), (k, "k")))
    q, k = (turned(w, batch["positions"], cfg.rope_theta) for w in (q, k))
    k, v = (jnp.repeat(w, cfg.n_heads // cfg.n_kv_heads, axis=2) for w in (k, v))
    segments, order = batch["segment_ids"], jnp.arange(x.shape[1])
    sees = (segments[:, :, None] == segments[:, None, :]) & (order[:, None] >= order[None, :])
    scores = jnp.where(sees[:, None], jnp.einsum("bsnh,btnh->bnst", q, k) / cfg.head_dim**0.5, -jnp.inf)
    return jnp.einsum("bnst,btnh,nhd->bsd", jax.nn.softmax(scores), v, weights["o"])


def swiglu(x, gate, up, down):
    inner = x @ gate
    return (inner / (1 + jnp.exp(-inner)) * (x @ up)) @ down


def gate(cfg, logits, bias):
    """Weight of every expert (0 where not chosen), whether it is chosen, and its probability; [B, S, E] each."""
    z = logits
    if cfg.normalized_gate:
        z = cfg.gate_scale * (z - z.mean(-1, keepdims=True)) / (z.std(-1, ddof=1, keepdims=True) + 1e-5)
    place = jnp.argsort(jnp.argsort(-(z + bias), axis=-1), axis=-1)
    chosen = place < cfg.top_k
    among = jnp.where(chosen, jnp.exp(z), 0)
    return among / among.sum(-1, keepdims=True), chosen, jnp.exp(z) / jnp.exp(z).sum(-1, keepdims=True)


def forward(cfg, params, batch):
    """Hidden states after the last norm, and of each mixture what its router did."""
    layers, seen, routers = params["layers"], {"mlp": 0, "moe": 0}, []
    x = params["embed"]["table"][batch["tokens"]]
    for layer in range(cfg.n_layers):
        h = norm(x, layers["norm_attn"][layer], cfg.norm_eps)
        x = x + attention(cfg, {name: layers["attn"][name][layer] for name in layers["attn"]}, h, batch)
        h = norm(x, layers["norm_mlp"][layer], cfg.norm_eps)
        kind = "moe" if is_mixture(cfg, layer) else "mlp"
        mine = {name: stack[seen[kind]] for name, stack in layers[kind].items()}
        seen[kind] += 1
        if kind == "mlp":
            x = x + swiglu(h, mine["gate"], mine["up"], mine["down"])
            continue
        logits = h @ mine["router"]
        weights, chosen, probs = gate(cfg, logits, mine.get("bias", 0.0))
        for e in range(cfg.n_experts):
            x = x + weights[..., e : e + 1] * swiglu(h, mine["gate"][e], mine["up"][e], mine["down"][e])
        routers.append({"h": h, "logits": logits, "chosen": chosen, "probs": probs})
    return norm(x, params["norm_final"], cfg.norm_eps), routers


def router_losses(cfg, routers, batch):
    """Switch loss and z-loss of each layer, summed over the rows, each row as often as it has labelled tokens; [L] each."""
    valid, labels = (batch["segment_ids"] > 0).astype(jnp.float32), batch["loss_weights"].sum(1)
    aux, z = [], []
    for router in routers:
        tokens = jnp.maximum(valid.sum(1), 1)[:, None]
        share = (router["chosen"] * valid[..., None]).sum(1) / (tokens * cfg.top_k)
        mean = (router["probs"] * valid[..., None]).sum(1) / tokens
        aux.append((labels * cfg.n_experts * (jax.lax.stop_gradient(share) * mean).sum(1)).sum())
        squared = jnp.log(jnp.exp(router["logits"]).sum(-1)) ** 2
        z.append((labels * (squared * valid).sum(1) / tokens[:, 0]).sum())
    return jnp.stack(aux), jnp.stack(z)


def overflow(load):
    """Share of each layer's assignments beyond a capacity of 1.25."""
    found = []
    for layer in np.asarray(load, np.float64):
        total, E = layer.sum(), len(layer)
        found.append(sum(max(x - 1.25 * total / E, 0) for x in layer) / total if total else 0.0)
    return np.array(found)


def next_token(cfg, options, params, batch, coefficient):
    """The mean loss over the labelled tokens, `coefficient` [L] that of the Switch loss."""
    hidden, routers = forward(cfg, params, batch)
    logits = hidden @ params["head"]
    log_z = jnp.log(jnp.exp(logits).sum(-1))
    logprob = jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0] - log_z
    total = (batch["loss_weights"] * (-logprob + options.z_loss * log_z**2)).sum()
    if routers:
        aux, z = router_losses(cfg, routers, batch)
        total += (coefficient * aux).sum() + options.router_z_loss * z.sum()
    return total / batch["loss_weights"].sum()
