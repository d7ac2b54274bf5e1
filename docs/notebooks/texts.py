"""Six texts of different kinds, written for these notebooks."""

BEES = (
    "Honeybees tell each other where flowers are by dancing. A bee that has found food runs along a straight line on the "
    "comb, wagging its body, and then returns in a half circle to start again. The angle of the line shows the direction "
    "of the food relative to the sun, and the length of the wagging run shows how far away it is. Other bees follow the "
    "dancer closely and then fly out to find the place. When the sun moves, the angle of the dance moves with it, although "
    "the bees in the hive cannot see the sky. On cloudy days they use the pattern of polarised light instead, which people "
    "cannot see without a filter. A hive that has to move dances, too: scouts return with the places that they have found, "
    "and the swarm leaves when most of them dance for the same hollow tree."
)
CODE = (
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / len(values)\n\n\n"
    "def variance(values):\n    center = mean(values)\n    return mean([(value - center) ** 2 for value in values])\n\n\n"
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    if len(ordered) % 2:\n"
    "        return ordered[middle]\n    return (ordered[middle - 1] + ordered[middle]) / 2\n\n\n"
    "def histogram(values, bins):\n    low, high = min(values), max(values)\n    counts = [0] * bins\n"
    "    for value in values:\n        place = int((value - low) / (high - low) * bins)\n"
    "        counts[min(place, bins - 1)] += 1\n    return counts\n"
)
BREAD = (
    "To bake bread without a scale, take a bowl and fill it with flour to the height of two fingers. Add a pinch of salt, a "
    "spoon of yeast, and warm water until the dough lets go of the bowl. Cover it with a cloth for an hour. The oven should "
    "be as hot as it gets. After twenty-five minutes, knock on the bottom of the loaf: if it sounds hollow, it is done. Let "
    "it cool on a rack, or the crust gets soft. The next day, put a little of the dough aside before you bake, cover it with "
    "water, and keep it in a cool place. It will rise more slowly than yeast, and the bread will taste of more. Flour differs "
    "from mill to mill, so write down how much water yours has taken, and begin with a little less the next time."
)
RIVER = (
    "The river has three bridges. The oldest, built in 1874, carries only people and bicycles; the second, of steel, carries "
    "the railway; and the newest, finished in 2003, carries 41,000 cars a day. When the town flooded in the spring of 1954, "
    "the water stood 3.2 metres above the road, and the only way across was the railway bridge, over which the council sent "
    "bread and coal. Since then a wall protects the lower streets. In 2013 the water reached its edge, and for one night "
    "nobody knew whether it would hold. It did, but the cellars behind it filled from below. The engineers have asked for "
    "pumps ever since; the council has asked for a cheaper plan."
)
LETTER = (
    "Dear Martha, you asked how we are doing in the new house. The roof holds, which is more than the old one ever did, and "
    "from the kitchen we can see the sea if we stand on a chair. Paul has planted beans and the goats of our neighbour have "
    "eaten them. He has planted them again, with a fence. The children walk to school along the dunes and come home with "
    "their pockets full of shells, and so is my washing. I miss the library, and you. If you come in August, take the slow "
    "train, which stops here, and bring a warm coat in spite of everything that they say about August. We have a bed for "
    "you, and a lamp to read by. Yours, Ellen."
)
SUMS = (
    "Question: If a train leaves at half past nine and needs two hours and a quarter, when does it arrive?\nAnswer: At a "
    "quarter to twelve.\n\nQuestion: A shop sells pencils in boxes of twelve. How many boxes are needed for a class of "
    "thirty children, if every child is to have two pencils?\nAnswer: Five boxes, because sixty pencils are needed.\n\n"
    "Question: A field is forty metres long and twenty-five metres wide. How long is a fence around it?\nAnswer: One hundred "
    "and thirty metres.\n\nQuestion: Three friends share a bill of forty-two euros. Each of them adds one euro for the "
    "waiter. What does each of them pay?\nAnswer: Fifteen euros.\n\nQuestion: A tank holds ninety litres and loses two "
    "litres an hour. After how many hours is a third of it gone?\nAnswer: After fifteen hours."
)

TEXTS = {"bees": BEES, "code": CODE, "bread": BREAD, "river": RIVER, "letter": LETTER, "sums": SUMS}
"""By a short name."""
