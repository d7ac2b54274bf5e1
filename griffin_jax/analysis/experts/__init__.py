"""Analyses of routed experts after "A Closer Look into Mixture-of-Experts" (arXiv 2406.18219), for any model.

    checkpoint   matrices of experts, read one after the other
    similarity   how similar experts' weights are (D1), and their mean neurons (D2a)
    matching     the neurons of one expert paired with those of another (D2b)
    routers      whether experts are as similar as their rows of the router (D3)
    components   principal components of experts and of neurons (D4)
    weights      all of these, layer by layer
    watching     what goes into feed-forward layers while texts are read
    outputs      how similar experts' outputs are (D5), their norms against gate scores (D6), active neurons (D7)
    choices      which experts texts choose (D8)
    sets         GRIFFIN's neuron sets of texts: what they share, and what kept neurons add
    texts        all of these over texts, with intervals
    claims       the three findings of the paper, judged by these numbers
    figures, report   figures and the page that shows them

Analyses of weights read any object with the methods of `checkpoint.Experts`; analyses of texts read any model. In a
model without routers, GRIFFIN's neuron sets of different texts take the place of experts.
"""
