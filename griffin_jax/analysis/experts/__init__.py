"""Analyses of routed experts after "A Closer Look into Mixture-of-Experts" (arXiv 2406.18219), for any model.

    checkpoint   matrices of experts, read one after the other
    similarity   how alike experts' weights are (D1), and their mean neurons (D2a)
    matching     the neurons of one expert paired with those of another (D2b)
    routers      whether rows of the router are as alike as experts are (D3)
    components   principal components of experts and of neurons (D4)
    weights      all of these, layer by layer
    watching     what goes into feed-forward layers while texts are read
    outputs      how alike experts' outputs are (D5), their norms against gate scores (D6), active neurons (D7)
    choices      which experts texts choose (D8)
    sets         GRIFFIN's neuron sets of texts: what they share, and what kept neurons add
    texts        all of these over texts, with intervals
    claims       the three findings of the paper, judged by these numbers
    figures, report   what people look at

What weights alone say is computed from any object with the methods of `checkpoint.Experts`, what texts say from any
model. A model without routers has GRIFFIN's neuron sets of different texts for experts.
"""
