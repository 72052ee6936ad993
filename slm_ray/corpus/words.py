"""The cast and the world of the sample corpus: names, lost things, hiding spots, weather.

Data only, read by `grammar` (which writes stories with it) and `consistency` (which finds it again in
one). A thing has a size class, and a hiding spot lists the classes it can hold, so that a button may lie
between two flat stones and a scarf may hang on a branch, never the other way round. No ordinary word of the
stories is also a name, and the noun of one thing never occurs in a story about another.
"""

from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split(";"))


BOYS = _words(
    "Tom Ben Max Sam Leo Noah Finn Jack Oscar Theo Luca Milo Hugo Felix Adam Omar Ravi Kofi Mateo Anton "
    "Elias "
    "Jonas Emil Oliver"
)
GIRLS = _words(
    "Mia Lucy Anna Ella Nora Zoe Lena Clara Emma Ruby Alice Sofia Maya Amina Priya Yuki Freya Ines "
    "Hannah Molly "
    "Greta Tilda Rosa Ida"
)
HE_ANIMALS = _words("Pip Barnaby Rufus Bruno Wilbur Otis Monty Chester Digby Toby Alfie Humphrey")
SHE_ANIMALS = _words("Tilly Mabel Willa Hazel Dotty Nutmeg Juniper Bonnie Flossie Tulip Matilda Winnie")
ANIMAL_KINDS = _words("rabbit squirrel hedgehog mouse fox badger otter mole beaver bear raccoon hamster")


@dataclass(frozen=True)
class Thing:
    """Something to lose. `size`: tiny, cloth, ball (rolls), medium or flat; `origin`: how the hero came by it."""

    noun: str
    size: str  # "t", "c", "b", "m" or "f"
    origin: str  # a key of scenes.ORIGINS
    adjectives: tuple[str, ...]
    use: str  # completes "loved to ..."; {his} is the hero's


_COLORS = _words("red blue green yellow purple orange pink white")
_METAL = _words("shiny silver golden brass copper gleaming")
_WOOD = _words("painted wooden smooth polished little")
_KNIT = _words("woolly striped warm soft fluffy spotted checkered")
_PAPER = _words("colorful old folded thick precious")

THINGS = (
    Thing("button", "t", "found", (*_METAL, "round", "blue"), "rub it with one thumb for luck"),
    Thing("ring", "t", "given", (*_METAL, "tiny"), "watch it sparkle in the light"),
    Thing("coin", "t", "found", (*_METAL, "foreign"), "flip it into the air and catch it"),
    Thing("key", "t", "given", (*_METAL, "rusty", "curious"), "guess which secret door it would open"),
    Thing("marble", "t", "given", ("glass", "swirly", *_COLORS), "roll it across the floor"),
    Thing(
        "seashell",
        "t",
        "found",
        ("pearly", "curly", "spotted", "pink", "white"),
        "hold it close and hear the waves",
    ),
    Thing("whistle", "t", "carved", (*_WOOD, "loud"), "blow a merry tune on it"),
    Thing("bell", "t", "given", (*_METAL, "jingling"), "jingle it at breakfast"),
    Thing("thimble", "t", "given", (*_METAL, "dented"), "drink pretend tea from it"),
    Thing("locket", "t", "given", (*_METAL, "oval"), "open it and look at the portrait inside"),
    Thing("brooch", "t", "given", ("butterfly", *_METAL), "wear it at parties"),
    Thing("compass", "t", "given", ("pocket", *_METAL), "find out which way was north"),
    Thing("medal", "t", "given", (*_METAL, "heavy"), "polish it until it gleamed"),
    Thing("domino", "t", "carved", ("ivory-white", "speckled", "lucky"), "balance it on its edge"),
    Thing("crayon", "t", "given", ("stubby", *_COLORS), "draw dragons with it"),
    Thing("scarf", "c", "sewn", (*_KNIT, *_COLORS), "wrap it around twice"),
    Thing("mitten", "c", "sewn", (*_KNIT, *_COLORS), "make snug shadow puppets with it"),
    Thing("ribbon", "c", "given", ("silky", "shimmering", *_COLORS), "twirl it like a dancer"),
    Thing("cap", "c", "sewn", (*_KNIT, *_COLORS), "tip it politely to everyone"),
    Thing("sock", "c", "sewn", (*_KNIT, *_COLORS), "wear it even in bed"),
    Thing("handkerchief", "c", "sewn", ("linen", "embroidered", *_COLORS), "wave it at passing travelers"),
    Thing("shawl", "c", "sewn", (*_KNIT, *_COLORS), "pretend that it had magic powers"),
    Thing("kite", "c", "made", ("diamond", "long-tailed", *_COLORS), "fly it high above the rooftops"),
    Thing("flag", "c", "made", ("pirate", "fluttering", *_COLORS), "march behind it like a captain"),
    Thing("cape", "c", "sewn", ("velvet", "swishing", *_COLORS), "play knights and heroes in it"),
    Thing("blanket", "c", "sewn", (*_KNIT, *_COLORS), "build cozy tents with it"),
    Thing("ball", "b", "given", ("rubber", "bouncy", "leather", *_COLORS), "bounce it a hundred times"),
    Thing("hoop", "b", "made", ("wooden", "spinning", *_COLORS), "roll it along with a stick"),
    Thing("spinning top", "b", "carved", (*_WOOD, *_COLORS), "spin it until it hummed"),
    Thing("teddy bear", "m", "sewn", ("brown", "cuddly", "shaggy", "patched"), "tell it every secret"),
    Thing("doll", "m", "sewn", ("rag", "curly-haired", "tiny", "smiling"), "rock it to sleep"),
    Thing("toy boat", "m", "carved", (*_WOOD, *_COLORS), "sail it in the bath"),
    Thing("toy train", "m", "carved", (*_WOOD, *_COLORS), "send it through pretend tunnels"),
    Thing("toy horse", "m", "carved", (*_WOOD, "galloping"), "let it gallop over the pillows"),
    Thing("toy dragon", "m", "sewn", ("fierce", "friendly", *_COLORS), "make it roar at dinner"),
    Thing("toy elephant", "m", "sewn", ("gray", "velvet", "floppy"), "carry it by its trunk"),
    Thing("puppet", "m", "made", ("funny", "long-nosed", "wooden"), "put on shows with it"),
    Thing("drum", "m", "made", ("noisy", *_COLORS), "beat it like thunder"),
    Thing("lantern", "m", "made", ("paper", "brass", "glowing"), "carry it through the dark"),
    Thing("cup", "m", "given", ("china", "chipped", *_COLORS), "sip warm milk from it"),
    Thing("bucket", "m", "given", ("tin", "plastic", *_COLORS), "gather treasures in it"),
    Thing("flute", "m", "carved", (*_WOOD, "bamboo"), "play quiet songs on it"),
    Thing("trumpet", "m", "given", (*_METAL, "loud"), "wake everyone up with it"),
    Thing("music box", "m", "given", ("delicate", "tinkling", "lacquered"), "listen to its gentle melody"),
    Thing("paintbrush", "m", "given", ("fine", "bristly", "wooden"), "paint bright sunsets with it"),
    Thing("umbrella", "m", "given", ("dotted", "huge", *_COLORS), "twirl it above the puddles"),
    Thing("magnifying glass", "m", "given", ("round", "powerful", "brass"), "study ants and petals through it"),
    Thing("watering can", "m", "given", ("tin", "dented", *_COLORS), "sprinkle the thirsty sprouts with it"),
    Thing("telescope", "m", "made", ("cardboard", "brass", "folding"), "look at the moon through it"),
    Thing("tambourine", "m", "made", ("jingling", *_COLORS), "shake it and dance"),
    Thing("book", "f", "given", ("thick", "picture", "tattered", *_COLORS), "read it under the covers"),
    Thing("letter", "f", "given", ("sealed", "long", "precious"), "read it again and again"),
    Thing("map", "f", "made", ("treasure", "crinkled", *_PAPER), "plan great journeys with it"),
    Thing("drawing", "f", "made", ("chalk", "framed", *_PAPER), "show it to all the neighbors"),
    Thing("notebook", "f", "given", ("leather", "secret", *_COLORS), "write rhymes in it"),
    Thing("photograph", "f", "given", ("faded", "family", "framed"), "smile at the faces in it"),
    Thing("postcard", "f", "given", ("glossy", "faraway", "stamped"), "dream about the mountains on it"),
    Thing("mask", "f", "made", ("tiger", "feathered", "glittering"), "pretend to be somebody else behind it"),
)


@dataclass(frozen=True)
class Place:
    """Where a story happens. A spot is "phrase", or "sizes:phrase" if only things of those sizes fit there."""

    prefix: str  # "in", "at", "on", "by"
    noun: str  # without its article
    who: str  # "k" children, "a" animals, "ka" both
    winter: bool
    doings: tuple[str, ...]  # what the hero did there, past tense
    spots: tuple[str, ...]

    def spots_for(self, size: str) -> list[str]:
        """The spots that can hold a thing of that size class: `"tf:in a crack"` holds "t" and "f"."""
        split = [spot.rpartition(":") for spot in self.spots]
        return [phrase for sizes, _, phrase in split if not sizes or size in sizes]


PLACES = (
    Place("in", "meadow", "ka", False,
          _phrases("chased butterflies; picked buttercups; rolled down the slope; danced with the "
                   "dandelions"),
          _phrases("in the tall grass; behind the old stone wall; beside the wooden stile; under the "
                   "hawthorn bush; tf:between two flat rocks; c:on a thorny branch; among the buttercups; "
                   "bm:inside a haystack")),
    Place("in", "forest", "ka", False,
          _phrases("counted mushrooms; climbed over mossy logs; listened to the cuckoo; followed a winding "
                   "trail"),
          _phrases("under a heap of leaves; behind the tallest pine; among the ferns; tcf:inside a hollow "
                   "log; c:on a low twig; beside the mossy stump; t:in the crook of a root; near the fallen "
                   "birch")),
    Place("by", "pond", "ka", False,
          _phrases("skipped stones; watched the tadpoles; counted the dragonflies; fed the ducks"),
          _phrases("among the reeds; under the little bridge; beside the rowboat; c:on the tip of a cattail; "
                   "behind the willow; t:between two pebbles; bmf:inside the rowboat; near the muddy "
                   "landing")),
    Place("by", "river", "ka", False,
          _phrases("built a dam of sticks; waded in the shallows; raced bark boats; watched the salmon leap"),
          _phrases("behind a big boulder; under the footbridge; in the rushes; among the driftwood; c:on a "
                   "bending alder; tf:between the roots of an alder; beside the fishing dock; near the "
                   "ferry")),
    Place("in", "orchard", "ka", False,
          _phrases("gathered cherries; swung on the lowest branch; played hide and seek; tasted the plums"),
          _phrases("under the apple tree; behind the tall ladder; between two crates of pears; in the "
                   "clover; c:on a crooked branch; tcf:inside an empty barrel; beside the wheelbarrow; near "
                   "the beehives")),
    Place("on", "hill", "ka", False,
          _phrases("ran against the breeze; turned ten somersaults; looked down at the valley; sang to the "
                   "clouds"),
          _phrases("behind the windmill; in the purple heather; under the lookout bench; beside the "
                   "signpost; tf:between two mossy rocks; c:on the prickly gorse; in a shallow hollow; near "
                   "the sheep path")),
    Place("at", "beach", "ka", False,
          _phrases("built a tall sandcastle; chased the foamy waves; dug a deep tunnel; collected seaweed"),
          _phrases("behind a sand dune; under the upturned canoe; beside a tide pool; in the seaweed; "
                   "t:between two barnacles; c:on the fishing nets; near the lighthouse steps; among the "
                   "beach grass")),
    Place("in", "garden", "ka", False,
          _phrases("pulled up carrots; smelled the roses; watered the sunflowers; picked ripe strawberries"),
          _phrases("under the rhubarb leaves; behind the compost heap; among the pumpkins; beside the "
                   "greenhouse; tf:inside a flowerpot; c:on the rose trellis; between the bean poles; in the "
                   "lavender")),
    Place("at", "farm", "ka", False,
          _phrases("fed the chickens; patted the spotted cow; helped to rake the straw; brushed the pony"),
          _phrases("in the hayloft; behind the tractor; under the water trough; beside the pigpen; t:in a "
                   "hen's nest; c:on the pasture fence; inside an empty manger; between two milk cans")),
    Place("in", "park", "k", False,
          _phrases("swooped down the slide; fed the pigeons; played tag; sailed leaves in the fountain"),
          _phrases("under the park bench; behind the drinking fountain; in the flower bed; beside the "
                   "bandstand; tf:between two paving stones; c:on the iron railing; near the duck house; "
                   "under the hedge")),
    Place("in", "school yard", "k", False,
          _phrases("jumped over chalk squares; hung from the climbing frame; played leapfrog; swapped "
                   "riddles"),
          _phrases("under the stone steps; behind the bicycle rack; in the sandbox; beside the tool shed; "
                   "t:in a crack of the bricks; c:on the coat hooks; near the swings; under the maple tree")),
    Place("at", "market", "k", False,
          _phrases("tasted a slice of melon; counted the cheeses; helped to carry potatoes; petted a sleepy "
                   "goat"),
          _phrases("under the fruit stall; behind a sack of onions; beside the fish cart; between two "
                   "baskets; t:among the walnuts; c:on the corner of an awning; near the flower stand; under "
                   "the baker's table")),
    Place("at", "harbor", "k", False,
          _phrases("waved at the sailors; counted the masts; watched the gulls dive; walked along the pier"),
          _phrases("behind a coil of rope; under an old tarpaulin; between two crab traps; beside the "
                   "anchor; t:in a gap of the planks; c:on a rusty hook; near the captain's hut; in a broken "
                   "crate")),
    Place("at", "train station", "k", False,
          _phrases("waved at the engine driver; read the timetable; counted the wagons; listened for the "
                   "steam"),
          _phrases("under the waiting bench; behind the luggage cart; beside the ticket window; near the "
                   "clock tower; t:in a groove of the platform; c:on the signal post; between two suitcases; "
                   "under the stairs")),
    Place("on", "snowy hill", "ka", True,
          _phrases("zoomed down on a sled; built a snowman; made angels in the snow; threw snowballs at a "
                   "stump"),
          _phrases("under a pile of snow; behind the snowman; beside the sled; under the frosty spruce; t:in "
                   "a deep footprint; c:on an icy branch; near the log cabin; in a snowdrift")),
    Place("by", "frozen lake", "ka", True,
          _phrases("slid across the ice; skated in wobbly circles; tapped on the icicles; followed bird "
                   "tracks"),
          _phrases("behind the boathouse; under the snowy pier; beside a frozen log; among the frosty reeds; "
                   "t:in a ridge of snow; c:on a bare birch; near the fishing hole; beneath the wooden "
                   "railing")),
)  # fmt: skip


@dataclass(frozen=True)
class Weather:
    """`adjective` goes before "morning"; `now` sets it; `turn` changes it in the middle of the story."""

    adjective: str
    winter: bool
    now: tuple[str, ...]
    turn: tuple[str, ...]


WEATHERS = (
    Weather("sunny", False, ("The sky was bright and blue.", "The sun shone on every leaf and stone.",
                             "Warm sunshine poured over the rooftops."),
            ("Just then, the sun slipped out from behind a cloud.", "A cool shadow passed, and the sun "
                                                                    "came back.")),
    Weather("windy", False, ("The wind tugged at everything.", "A frisky wind whistled around the corners.",
                             "The trees swayed and creaked in the wind."),
            ("All at once, the wind died down.", "Slowly the wind grew tired, and the trees stood still.")),
    Weather("rainy", False, ("Drops pattered softly on the leaves.", "There were puddles everywhere.",
                             "A fine rain tickled every nose."),
            ("At last the rain stopped, and a rainbow appeared.", "The rain turned into a sparkle and "
                                                                  "was gone.")),
    Weather("foggy", False, ("The fog was as thick as porridge.", "Mist hung over the ground like a veil.",
                             "Everything looked pale and ghostly."),
            ("Little by little, the fog lifted.", "A breeze came and swept the fog away.")),
    Weather("cloudy", False, ("Big clouds drifted by like lazy whales.", "The sky was gray and sleepy.",
                              "The clouds hung low over the chimneys."),
            ("Then the clouds parted, and a sunbeam broke through.", "Far away, thunder grumbled softly.")),
    Weather("breezy", False, ("The air smelled of hay and honey.", "A light breeze ruffled every "
                                                                   "feather and leaf.",
                              "Tiny seeds floated on the breeze."),
            ("The breeze rose and shook the branches.", "The breeze turned, and the air became "
                                                        "perfectly calm.")),
    Weather("snowy", True, ("Fat snowflakes tumbled from the sky.", "The whole world was white and silent.",
                            "Fresh snow covered every roof."),
            ("Then it stopped snowing, and the world glittered.", "The snowflakes grew fewer and fewer.")),
    Weather("frosty", True, ("Every breath made a small cloud.", "The frost crunched under every step.",
                             "Ice flowers bloomed on the windows."),
            ("The winter sun rose a little higher and made the frost glitter.", "An icy gust blew and "
                                                                                "was gone.")),
)  # fmt: skip

# One of each is drawn for a story: index 0 for children, 1 for animals.
HOMES = (
    _phrases("a village by the sea; a little town between two hills; a cottage at the edge of the woods; "
             "a tall house with green shutters; a busy city full of towers; a flat above a bakery; "
             "a quiet suburb full of chestnut trees; a farmhouse with a crooked roof; a valley full of vineyards"),
    _phrases("a cozy burrow under an oak; a snug den near the waterfall; a valley full of ferns; "
             "a hole with a round door; a nest of roots and straw; a little cave lined with moss; "
             "the roots of an ancient beech"),
)  # fmt: skip
FINDERS = (
    _phrases("baker; mail carrier; gardener; shepherd; librarian; miller; carpenter; painter; cook; tailor; "
             "street sweeper"),
    _phrases("owl; tortoise; heron; goose; stork; pheasant; donkey"),
)  # fmt: skip
FRIEND_HOMES = _phrases(
    "from next door; from across the street; from the bakery; from the music class; from the corner shop; "
    "from the upper floor; from the swimming club"
)
GIVERS = _phrases("grandmother; grandfather; mother; father; aunt; uncle; big sister; big brother; cousin; godmother")
CREATURES = _phrases("young crow; duckling; baby magpie; small owl; gosling; fluffy chick; tiny swallow")
SNACKS = _phrases(
    "blueberry muffins; warm bread; a bowl of cherries; pancakes; sweet grapes; oatmeal cookies; tomato soup; "
    "roasted chestnuts; apple pie; cheese sandwiches; honey cake; a jug of lemonade; buttered corn; dried apricots; "
    "vanilla pudding; toast with raspberry jam; a handful of hazelnuts"
)
TIMES = _phrases(
    "morning; morning; morning; afternoon; afternoon; day; Monday morning; Tuesday afternoon; Wednesday morning; "
    "Thursday afternoon; Friday morning; Saturday; Sunday"
)
DECOYS = {  # what lay at a wrong spot, by whether it is winter
    False: _phrases(
        "sleepy beetle; shy snail; ladybug; round toad; grasshopper; striped caterpillar; spider and its web; "
        "quick lizard; sparrow; brown moth; wriggling worm; cricket; row of ants; broken twig; bent nail; "
        "pile of dust; torn sack; piece of string; bumblebee; old boot; cracked jar; wet sponge; clump of moss; "
        "bent fork"
    ),
    True: _phrases(
        "robin; pinecone; icicle; frozen leaf; lump of ice; broken ski; lost skate; bird track; sparrow; old boot; "
        "chunk of bark; plump bullfinch"
    ),
}

# Drawn anew at each use, unlike the cast: {glad} is how somebody felt.
POOLS = {
    "glad": _words("happy glad cheerful delighted proud grateful joyful thankful relieved content"),
    "sad": _words("sad worried upset gloomy miserable lonely unhappy troubled downcast"),
    "nice": _words("kind clever gentle helpful thoughtful patient loyal good wise faithful sensible"),
    "softly": _words("softly quietly gently kindly warmly calmly"),
    "carefully": _words("carefully slowly patiently thoroughly closely"),
}
