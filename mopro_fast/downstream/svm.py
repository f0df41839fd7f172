"""One SVM and its score. Processes that train them import this module alone: no torch, so that they start at once."""

import warnings

import numpy as np

MAX_ITER = 2000


def train_and_score(
    key: tuple, train: np.ndarray, rows: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray, one: bool,
    cost: float
) -> tuple[tuple, float, bool]:  # fmt: skip
    """-> key, score, converged. one: this class against all others, the score is its average precision."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    svm = LinearSVC(
        C=cost, class_weight={1: 2, -1: 1} if one else None, dual=True, max_iter=MAX_ITER, tol=1e-4, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
        warnings.filterwarnings("ignore", "The number of unique classes")  # with k = 1 each row is one
        svm.fit(train[rows], np.where(labels > 0, 1, -1) if one else labels)
    result = average_precision(truth > 0, svm.decision_function(test)) if one else np.mean(svm.predict(test) == truth)
    return key, 100 * float(result), bool(np.max(svm.n_iter_) < MAX_ITER)


def unit(features: np.ndarray) -> np.ndarray:
    """float32 [n, F] as the official script scales them."""
    return features / (np.linalg.norm(features, axis=1) + 1e-5)[:, None]


def average_precision(present: np.ndarray, scores: np.ndarray) -> float:
    """The area under precision's upper envelope over recall, VOC's measure from 2010 on. present: bool [n]."""
    order = np.argsort(scores)[::-1]  # ties as in the official script
    hits = np.cumsum(present[order])
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[present[order]].sum() / hits[-1])  # recall rises by 1 / hits[-1] at every hit
