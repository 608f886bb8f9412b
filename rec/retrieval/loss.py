"""The two losses of retrieval, as TFRS tasks. `RetrievalModel.compute_loss` calls the one that fits `retrieval.arch`.

- `SampledSoftmax` trains queries of sequences: which item comes next, against a pool of sampled negatives.
- `HiddenItems` trains queries of sets (arch autoencoder): which items were hidden from the history, against all others.
"""

import tensorflow as tf
import tensorflow_recommenders as tfrs

MASKED = float(tf.float32.min) / 100  # a logit that must not count; far from overflow when summed
UNOBSERVED = 0.5  # the weight of an item without an interaction; an interaction has weight 1


class SampledSoftmax(tfrs.tasks.Retrieval):
    """Softmax cross-entropy of each position's target against one pool of negatives that the whole batch shares.

    For a query q, its target i, the pool C, the temperature T and the probability p(j) that a slot of the pool holds j:

        s(j) = q . v(j) / T - log p(j)
        loss = log( exp s(i) + sum of exp s(j) over C ) - s(i)

    Subtracting log p is the logQ correction (Bengio and Senecal 2008; Yi et al. 2019): popular items are drawn as
    negatives often, and would be pushed down without it. The cost is linear in the batch. TFRS's own `call` compares
    each query with the targets of all others, which is quadratic.
    """

    def __init__(self, temperature: float, corrects_sampling: bool) -> None:
        """`corrects_sampling`: whether the logQ correction is on."""
        super().__init__(temperature=temperature, name="sampled_softmax")
        self._corrects_sampling = corrects_sampling

    def call(
        self,
        queries: tf.Tensor,
        targets: tf.Tensor,
        negatives: tf.Tensor,
        *,
        target_probability: tf.Tensor,
        negative_probability: tf.Tensor,
        sample_weight: tf.Tensor,
        negative_mask: tf.Tensor,
    ) -> tf.Tensor:
        """The mean loss over positions. With several replicas, this replica's part of it.

        Args:
          queries, targets: [P, d] float32. The last dimension of a query is 1, so that of a target is a bias.
          negatives: [C, d] float32, the pool.
          target_probability, negative_probability: [P] and [C] float32, p of each item.
          sample_weight: [P] float32; 0 leaves a position out.
          negative_mask: [G, C] bool, False if a pool item is no negative. P is a multiple of G: each row is for P / G
            positions in turn, such as those of one window.
        """
        queries = queries / self._temperature
        if self._corrects_sampling:
            # Corrected in the bias of each item instead of in each logit. That is the same, and saves one pass over
            # all P x C logits.
            targets = _add_to_bias(targets, -self._temperature * tf.math.log(target_probability))
            negatives = _add_to_bias(
                negatives, -self._temperature * tf.math.log(negative_probability)
            )
        positive = tf.reduce_sum(queries * targets, 1, keepdims=True)  # [P, 1]
        negative = tf.matmul(queries, negatives, transpose_b=True)  # [P, C]
        negative = _mask(negative, negative_mask)
        logits = tf.concat([positive, negative], 1)
        right_answer = tf.zeros(tf.shape(logits)[:1], tf.int32)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(right_answer, logits)
        return _weighted_mean(losses, sample_weight)


class HiddenItems(tf.keras.layers.Layer, tfrs.tasks.Task):
    """Weighted squared errors (Hu et al. 2008, iALS): a hidden item should score 1, an item without interaction 0."""

    def call(
        self,
        hidden_scores: tf.Tensor,
        other_scores: tf.Tensor,
        *,
        hidden_weight: tf.Tensor,
        is_other: tf.Tensor,
        other_probability: tf.Tensor,
    ) -> tf.Tensor:
        """The loss per hidden item. With several replicas, this replica's part of it.

        Args:
          hidden_scores: [B, L] float32, of each user's own items.
          other_scores: [B, C] float32, of a sample of the catalogue.
          hidden_weight: [B, L] float32, how much each item counts; 0 if it was not hidden from the history.
          is_other: [B, C] bool, False if the user has interacted with the item.
          other_probability: [C] float32: an item stands for as many as it was improbable to be drawn.
        """
        sampled = tf.cast(tf.size(other_probability), tf.float32)
        stands_for = UNOBSERVED / (other_probability * sampled)
        missed = tf.reduce_sum(hidden_weight * tf.square(1 - hidden_scores))
        false_alarms = tf.where(is_other, tf.square(other_scores) * stands_for, 0.0)
        count = sum_over_replicas(tf.reduce_sum(hidden_weight))
        return (missed + tf.reduce_sum(false_alarms)) / tf.maximum(count, 1.0)


def sum_over_replicas(value: tf.Tensor) -> tf.Tensor:
    """The sum of all replicas' values, if several replicas train on one batch."""
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


def _weighted_mean(losses: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    total_weight = sum_over_replicas(tf.reduce_sum(weights))
    return tf.reduce_sum(weights * losses) / tf.maximum(total_weight, 1.0)


def _add_to_bias(vectors: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Adds values [N] to the last dimension of vectors [N, d]."""
    return tf.concat([vectors[:, :-1], vectors[:, -1:] + values[:, None]], 1)


def _mask(logits: tf.Tensor, keep: tf.Tensor) -> tf.Tensor:
    """[P, C] logits, MASKED where `keep` [G, C] is False; each row of `keep` is for P / G rows in turn."""
    by_row = tf.reshape(logits, [tf.shape(keep)[0], -1, tf.shape(logits)[1]])
    return tf.reshape(tf.where(keep[:, None], by_row, MASKED), tf.shape(logits))
