"""CAPro, section by section, as its code computes it: loops, one row at a time, autograd throughout.

Deliberately slow and plain: it shares no code with mopro_fast except the ResNet. One object holds all ranks; it is what
the trainer's model is compared with.
"""

import copy

import torch
import torch.nn.functional as F


class PlainCAPro:
    def __init__(self, model, ranks: int) -> None:
        """model: a fresh CAPro, whose weights and settings are copied."""
        self.c, self.own, self.ranks = model.config, model.capro, ranks
        self.replicas = [copy.deepcopy(_Heads(model)) for _ in range(ranks)]  # as under data parallelism
        self.keys = [copy.deepcopy(model.encoder_k) for _ in range(ranks)]
        self.queue, self.ptr = model.queue.clone(), 0
        self.prototypes = model.prototypes.clone()

    def named_parameters(self, rank: int = 0) -> dict[str, torch.Tensor]:
        """By CAPro's names, without the classifier's bias, which it does not have."""
        named = dict(self.replicas[rank].named_parameters())
        return {name: p for name, p in named.items() if name != "encoder_q.classifier.bias"}

    def start(self, images, labels) -> None:
        """Prototypes from anchors: images [A, 3, H, W], labels [A]."""
        encoder = self.keys[0].eval()
        sums, counts = torch.zeros_like(self.prototypes), [0] * len(self.prototypes)
        with torch.no_grad():
            for image, y in zip(images, labels.tolist(), strict=True):
                sums[y] += self.replicas[0].encoder_q.project(encoder(image[None]))[0]
                counts[y] += 1
        encoder.train()
        for y, count in enumerate(counts):
            mean = sums[y] / (count + 1e-6)
            self.prototypes[y] = mean / mean.norm() if count else 0.0

    def neighbours(self, z, auxiliary):
        """t of one row: the label distributions of all keys, weighted by their cosine with z."""
        c, total, weight = self.c, 0.0, 0.0
        for key in self.queue:
            by_prototypes = torch.stack([key @ p for p in self.prototypes]) / c.temperature
            v = c.alpha * (auxiliary @ key).softmax(0) + (1 - c.alpha) * by_prototypes.softmax(0)
            u = float((z @ key).clamp(0, 1)) + 1e-7
            total, weight = total + u * v, weight + u
        t = (total / weight).clamp(0, 1)
        return t / t.sum()

    def step(self, views_q, views_k, labels, anchors, epoch: int, order, frozen: bool):
        """Views [W, N, 3, H, W], labels and anchors [W, N]; -> (losses, labels and kept of each rank; mean gradients).

        order: of all ranks' rows for the key encoder.
        """
        c, own, n = self.c, self.own, len(labels[0])
        begun = own.init_proto != "never" and epoch > own.init_proto
        # Steps 1 and 2: queries, with this step's heads for the keys, too.
        outputs = []
        for rank, replica in enumerate(self.replicas):
            replica.zero_grad(set_to_none=True)
            with torch.set_grad_enabled(not frozen):
                x = replica.encoder_q.features(views_q[rank])
            z = replica.encoder_q.project(x)
            r = replica.reconstruction(z.detach() if begun else z)
            outputs.append((replica.encoder_q.classifier(x), z, x, r, replica.auxiliary(z)))
        # Step 3: keys.
        shuffled = views_k.flatten(0, 1)[torch.as_tensor(order)]
        keys = torch.empty(n * self.ranks, self.queue.shape[1])
        with torch.no_grad():
            for rank, encoder in enumerate(self.keys):
                k = self.replicas[rank].encoder_q.project(encoder(shuffled[rank * n : (rank + 1) * n]))
                for j in range(n):
                    keys[order[rank * n + j]] = k[j]
        # Step 4: the instance loss, against the queue before this step.
        before = self.queue.clone()
        inst = []
        for rank, (_, z, _, _, _) in enumerate(outputs):
            rows = []
            for i in range(n):
                bank = [z[i] @ keys[rank * n + i]] + [z[i] @ row for row in before]
                rows.append(F.cross_entropy(torch.stack(bank)[None] / c.temperature, torch.tensor([0])))
            inst.append(sum(rows) / n)
        # Step 5: the keys enter the queue.
        for key in keys:
            self.queue[self.ptr] = key
            self.ptr = (self.ptr + 1) % len(self.queue)
        results, all_z, all_labels, all_kept = [], [], [], []
        for rank, (logits, z, x, r, a) in enumerate(outputs):
            y, kept, cls, aux, proto, recn = labels[rank].clone(), [], [], [], [], []
            for i in range(n):
                # Step 6: collective bootstrapping.
                t = self.neighbours(z[i].detach(), self.replicas[rank].auxiliary.weight.detach()).detach()
                # Steps 7 and 8: label correction.
                s = torch.stack([z[i] @ p for p in self.prototypes]) / c.temperature
                keep = bool(y[i] >= 0)
                if begun and epoch >= c.start_clean:
                    tau = (c.alpha * logits[i].softmax(0) + (1 - c.alpha) * s.softmax(0)).detach()
                    keep = keep and (bool(tau[y[i]] >= 1 / len(tau)) or bool(anchors[rank][i]))
                    if tau.max() >= c.threshold and not (anchors[rank][i] and y[i] >= 0):
                        y[i], keep = tau.argmax(), True
                kept.append(keep)
                if not keep:
                    continue
                # Step 10: the losses of a kept row.
                label = y[i : i + 1].clone()
                cls.append(F.cross_entropy(logits[i][None], label))
                soft = -(t * a[i].log_softmax(0)).sum()
                aux.append((1 - own.beta) * F.cross_entropy(a[i][None], label) + own.beta * soft)
                proto.append(F.cross_entropy(s[None], label))
                recn.append(((r[i] - x[i].detach()) ** 2).mean())
            if cls:
                mean = {name: sum(rows) / len(rows) for name, rows in (("cls", cls), ("aux", aux), ("recn", recn))}
                loss = mean["cls"] + mean["aux"] + c.w_inst * inst[rank] + own.w_recn * mean["recn"]
                if begun:
                    mean["proto"] = sum(proto) / len(proto)
                    loss = loss + c.w_proto * mean["proto"]
            else:  # neither a loss nor a gradient
                mean, loss = {}, 0.0 * (logits.sum() + z.sum() + r.sum() + a.sum())
            loss.backward()
            values = {"loss": loss.item()} | {f"loss_{name}": m.item() for name, m in mean.items()}
            results.append(values | {"labels": y, "kept": torch.tensor(kept)})
            all_z += list(z.detach())
            all_labels += y.tolist()
            all_kept += kept
        # Step 9: prototypes, row by row.
        if begun:
            for z, y, kept in zip(all_z, all_labels, all_kept, strict=True):
                if kept:
                    self.prototypes[y] = c.proto_momentum * self.prototypes[y] + (1 - c.proto_momentum) * z
            for i, row in enumerate(self.prototypes):
                if row.norm() > 0:
                    self.prototypes[i] = row / row.norm()
        gradients = {}
        for name in self.named_parameters():
            of_ranks = [self.named_parameters(rank)[name] for rank in range(self.ranks)]
            if of_ranks[0].grad is not None:
                gradients[name] = sum(p.grad for p in of_ranks) / self.ranks
                for p in of_ranks:
                    p.grad = gradients[name].clone()
        return results, gradients

    def update_key_encoder(self) -> None:
        m = self.c.key_momentum
        with torch.no_grad():
            for replica, encoder in zip(self.replicas, self.keys, strict=True):
                own = dict(replica.encoder_q.named_parameters())
                for name, p in encoder.named_parameters():
                    p.copy_(m * p + (1 - m) * own[name])


class _Heads(torch.nn.Module):
    def __init__(self, model) -> None:
        super().__init__()
        self.encoder_q, self.reconstruction, self.auxiliary = model.encoder_q, model.reconstruction, model.auxiliary
