"""Section by section, MoPro as the paper and the official code state it: loops, one row at a time, autograd throughout.

Deliberately slow and plain: it shares no code with mopro_fast except the ResNet and the shuffle's permutation.
One object holds all ranks; it is what the trainer's model is compared with.
"""

import copy

import torch
import torch.nn.functional as F


class PlainMoPro:
    def __init__(self, encoder_q, queue, config, ranks: int) -> None:
        self.c, self.ranks = config, ranks
        self.encoder_q = [copy.deepcopy(encoder_q) for _ in range(ranks)]  # replicas, as under data parallelism
        for parameter in (p for encoder in self.encoder_q for p in encoder.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        self.encoder_k = [copy.deepcopy(encoder_q) for _ in range(ranks)]
        self.queue = queue.clone()
        self.ptr = 0
        self.prototypes = torch.zeros(encoder_q.classifier.out_features, queue.shape[1])

    def step(self, views_q, views_k, labels, epoch: int, order):
        """Views [W, N, 3, H, W] and labels [W, N]; -> (per rank a dict of losses, labels, kept; mean gradients)."""
        c, n = self.c, len(labels[0])
        shuffled = views_k.flatten(0, 1)[torch.as_tensor(order)]
        keys = torch.empty(n * self.ranks, self.queue.shape[1])
        with torch.no_grad():
            for rank, encoder in enumerate(self.encoder_k):
                _, k = encoder(shuffled[rank * n : (rank + 1) * n])
                for j in range(n):
                    keys[order[rank * n + j]] = k[j]
        results, all_q, all_labels, all_kept = [], [], [], []
        for rank in range(self.ranks):
            logits, q = self.encoder_q[rank](views_q[rank])
            y, kept = labels[rank].clone(), []
            inst, cls, proto = [], [], []
            for i in range(n):
                k = keys[rank * n + i]
                scores = torch.stack([q[i] @ k] + [q[i] @ row for row in self.queue]) / c.temperature
                inst.append(F.cross_entropy(scores[None], torch.tensor([0])))
                s = torch.stack([q[i] @ row for row in self.prototypes]) / c.temperature
                keep = bool(y[i] >= 0)
                if epoch >= c.start_clean:
                    t = (c.alpha * logits[i].softmax(0) + (1 - c.alpha) * s.softmax(0)).detach()
                    keep = keep and bool(t[y[i]] > 1 / len(t))
                    if t.max() > c.threshold:
                        y[i], keep = t.argmax(), True
                kept.append(keep)
                if keep:
                    cls.append(F.cross_entropy(logits[i][None], y[i : i + 1].clone()))
                    proto.append(F.cross_entropy(s[None], y[i : i + 1].clone()))
            loss_inst = sum(inst) / n
            loss_cls = sum(cls) / len(cls) if cls else torch.zeros(())
            loss_proto = sum(proto) / len(proto) if proto and epoch >= 1 else torch.zeros(())
            loss = loss_cls + c.w_proto * loss_proto + c.w_inst * loss_inst
            self.encoder_q[rank].zero_grad(set_to_none=False)
            loss.backward()
            results.append(
                {"loss": loss.item(), "loss_cls": loss_cls.item(), "loss_proto": loss_proto.item()}
                | {"loss_inst": loss_inst.item(), "labels": y, "kept": torch.tensor(kept)}
            )
            all_q += list(q.detach())
            all_labels += y.tolist()
            all_kept += kept
        for key in keys:
            self.queue[self.ptr] = key
            self.ptr = (self.ptr + 1) % len(self.queue)
        for q, y, kept in zip(all_q, all_labels, all_kept, strict=True):
            if kept:
                self.prototypes[y] = c.proto_momentum * self.prototypes[y] + (1 - c.proto_momentum) * q
        for i, row in enumerate(self.prototypes):
            if row.norm() > 0:
                self.prototypes[i] = row / row.norm()
        gradients = {}
        for parameters in zip(*(e.named_parameters() for e in self.encoder_q), strict=True):
            mean = sum(p.grad for _, p in parameters) / self.ranks
            gradients[parameters[0][0]] = mean.clone()
            for _, p in parameters:
                p.grad.copy_(mean)
        return results, gradients

    def update_key_encoder(self) -> None:
        m = self.c.key_momentum
        with torch.no_grad():
            for q, k in zip(self.encoder_q, self.encoder_k, strict=True):
                for p_q, p_k in zip(q.parameters(), k.parameters(), strict=True):
                    p_k.copy_(m * p_k + (1 - m) * p_q)
