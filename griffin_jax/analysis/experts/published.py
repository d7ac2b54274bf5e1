"""What the analyses do, and what "A Closer Look into Mixture-of-Experts" (arXiv 2406.18219) found with them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Study:
    """One analysis.

    Attributes:
        key: short name of the analysis.
        title: what the analysis is about.
        procedure: what is computed.
        finding: what the paper found; empty if it says nothing about this.
    """

    key: str
    title: str
    procedure: str
    finding: str = ""


WEIGHTS = (
    Study(
        "D1",
        "Similarity of experts' matrices",
        "Cosine of the flattened matrices of every pair of experts of a layer.",
        "Mixtral: 0.2 to 0.4, lower in deep layers. DeepSeek and Grok-1: about 0. An expert unlike all others is a dark"
        " cross.",
    ),
    Study(
        "D2",
        "Mean neurons, and neurons matched one by one",
        "Cosine of the mean neurons of two experts. Then the neurons of one expert are assigned to those of another so"
        " that the sum of their cosines is largest; the cosine of the matrices is computed in that order, and Kendall's"
        " tau of the order: 1 if nothing had to be moved, 0 if the order says nothing.",
        "Tau is 0.75 in Mixtral, and about 0 in DeepSeek and Grok-1.",
    ),
    Study(
        "D3",
        "Rows of the router against experts",
        "Regression of the cosines of experts' mean neurons on the cosines of the router's rows, over all pairs of a"
        " layer; next to it the same with the router's rows given to experts at random.",
        "R&sup2; for Wup, Wact and Wdown, averaged over layers: Mixtral 8x7B .06, .33, .07; Mixtral 8x22B .13, .26,"
        " .13; DeepSeek .00, .40, .00; Grok-1 .04, .15, .04. Only the gates go with the router: what"
        " turns neurons on is like what turns experts on.",
    ),
    Study(
        "D4",
        "Principal components",
        "Flattened experts, each number standardised over the experts, along their first two principal components;"
        " single neurons of all experts along two and three.",
        "The experts that stand apart are the dark crosses of D1.",
    ),
)

TEXTS = (
    Study(
        "D5",
        "Similarity of experts' outputs",
        "Every expert answers every token, with the layer's own input. Angular similarity, 1 - arccos(cosine) / &pi;,"
        " of each pair of outputs, averaged over tokens; 0.5 if they have nothing in common.",
        "Chosen experts are more alike than others. Similarity falls with depth and jumps in the last layer.",
    ),
    Study(
        "D6",
        "Output norms against gate scores",
        "For each token, experts are ranked by the norm of their output and by their gate score.",
        "Mixtral: the diagonal dominates, that is the expert with the largest score mostly has the largest output.",
    ),
    Study(
        "D7",
        "Intermediate states",
        "act(Wact x) of experts for the tokens of a text. The share of active neurons is"
        " (&Sigma;a&sup2;)&sup2; / (F &Sigma;a&#8308;): 1 if all are alike, 1/F if there is only one.",
    ),
    Study(
        "D8",
        "Chosen experts",
        "Which experts the tokens of a text choose, how evenly, and how often a token chooses an expert that the one"
        " before it chose, too; next to it the same for tokens in random order.",
    ),
)

GRIFFIN = Study(
    "GRIFFIN",
    "GRIFFIN's neuron sets",
    "The neurons that GRIFFIN keeps for the first half of a text, compared with those of its second half and of other"
    " texts (Jaccard similarity; of routed experts, within those that both chose), and the norm of what kept and"
    " dropped neurons add to the layer's output in the second half.",
)

PRETRAINING = Study(
    "D9",
    "Where a dense layer may stand",
    "Not done. It asks how the quality of a model of routed experts changes with the place of one dense layer among"
    " them, for which a model has to be pre-trained for each place. Taking the router out of a layer of a trained model"
    " measures something else: how much that layer's experts have specialised.",
    "Quality falls as the dense layer moves deeper.",
)
