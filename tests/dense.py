"""Second moments as dense matrices in float64: what sketches and merges by them are held to."""

import numpy as np
import torch

from recall_merge.maths.moments import Moment


def cut_moment(moment, rank):
    """The leading `rank` eigenvectors of a dense moment, and a diagonal that keeps its own as it is."""
    dense = moment.double().numpy()
    values, vectors = np.linalg.eigh(dense)
    first = max(0, len(values) - rank)
    factor = vectors[:, first:] * np.sqrt(values[first:].clip(min=0))
    rest = (dense.diagonal() - (factor**2).sum(1)).clip(min=0)
    return Moment(torch.from_numpy(factor).float(), torch.from_numpy(rest).float())


def spectral_error(found, inputs):
    """How far a moment is from that of all inputs (n, i) cut to as many directions, as a share of its largest eigenvalue."""
    x = inputs.double()
    wanted = cut_moment(x.mT @ x / len(x), found.factor.shape[1]).dense().double()
    return float(torch.linalg.matrix_norm(found.dense().double() - wanted, 2) / torch.linalg.matrix_norm(wanted, 2))
