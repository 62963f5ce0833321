"""The family of operators by hand: parameters for each, its formula at one position in float64, and a plain hook."""

import torch

from caa_lens.steering.interventions import Intervention


def parameters_of(d, seed=3, scale=1.0):
    """Parameters for every operator, of a stream of some width."""
    draw = torch.Generator().manual_seed(seed)

    def drawn():
        return scale * torch.randn(d, generator=draw)

    return {
        "add": {"direction": drawn()},
        "ablate": {"direction": drawn()},
        "set": {"direction": drawn()},
        "pull": {"direction": drawn(), "target": torch.tensor(2.5)},
        "add_if_projection": {"direction": drawn(), "gate": drawn(), "threshold": torch.tensor(0.3)},
        "add_if_cosine": {"direction": drawn(), "gate": drawn(), "threshold": torch.tensor(0.1)},
        "add_keep_norm": {"direction": drawn()},
        "rotate": {"direction": drawn(), "toward": drawn(), "angle": torch.tensor(0.7)},
        "affine": {"scale": drawn().exp(), "shift": drawn(), "low": -3 * drawn().abs(), "high": 3 * drawn().abs()},
        "scale": {"factor": (drawn() > 0).float()},
    }


def by_hand(operator, h, p, s):
    """One position, in float64, written out; rotation by the matrix of the plane."""
    h, p = h.double(), {name: one.double() for name, one in p.items()}
    v = p.get("direction", torch.zeros_like(h))
    u = v / v.norm() if v.norm() else v
    if operator == "rotate":
        basis = torch.linalg.qr(torch.stack([p["direction"], p["toward"]], dim=1)).Q
        e1 = basis[:, 0] * torch.sign(basis[:, 0] @ p["direction"])
        e2 = basis[:, 1] * torch.sign(basis[:, 1] @ p["toward"])
        generator = torch.outer(e2, e1) - torch.outer(e1, e2)
        return torch.linalg.matrix_exp(s * p["angle"] * generator) @ h
    if operator == "affine":
        moved = (s * (p["scale"] - 1) + 1) * h + s * p["shift"]  # the map with its strength folded in
        return torch.where((h > p["low"]) & (h < p["high"]), moved, h) if "low" in p else moved
    if operator.startswith("add_if"):
        along = h @ p["gate"] / p["gate"].norm()
        along = along / h.norm() if operator.endswith("cosine") else along
        return h + s * v if along > p["threshold"] else h
    return {
        "add": h + s * v,
        "ablate": h - s * (h @ u) * u,
        "set": h + (s * v.norm() - h @ u) * u,
        "pull": h + s * (p.get("target", 0) - h @ u) * u,
        "add_keep_norm": (h + s * v) * h.norm() / (h + s * v).norm(),
        "scale": h * (1 + s * p.get("factor", 0)),
    }[operator]


def plain_hook_of(operator, parameters, layer, strength, positions):
    """A TransformerLens hook that edits some positions of a whole text, one after another."""

    def edit(resid, hook):
        edited = resid.clone()
        for pos in range(resid.shape[1]):
            if pos in positions:
                for row in range(len(resid)):
                    edited[row, pos] = by_hand(operator, resid[row, pos], parameters, strength).to(resid.dtype)
        return edited

    return f"blocks.{layer}.hook_resid_post", edit


def intervention_of(operator, parameters, layer, strength=0.8, **said):
    """The same as an order."""
    return Intervention(operator=operator, parameters=parameters, layer=layer, multiplier=strength, **said)


def range_of(name, prompt, length):
    """Which positions of a whole text of some length a name means."""
    start, answer = prompt.steer_start, prompt.answer_start
    return {
        "caa": range(start, length),
        "all": range(length),
        "after_first": range(1, length),
        "prompt": range(answer),
        "answer": range(answer, length),
        "last": range(answer - 1, answer),
    }[name]
