"""The plots of the sample corpus: ten kinds of hero, and what each learns from losing a thing.

Data only, read by `grammar`. The templates keep to the rules of `scenes`. Each idea follows the meeting
with the friend, each find names the true spot, and each lesson fits the hero's trait.
"""

from dataclasses import dataclass

from slm_ray.corpus.scenes import templates


@dataclass(frozen=True)
class Plot:
    """What kind of hero loses the thing, how the friend helps, how it is found, and what the hero learns."""

    traits: tuple[str, ...]
    ideas: tuple[str, ...]
    finds: tuple[str, ...]
    lessons: tuple[str, ...]
    sizes: str = "tcbmf"  # what can be lost in this plot
    friend_from_start: bool = False
    is_hard_to_tell: bool = False  # the hero does not tell the friend about the loss at once


PLOTS = (
    Plot(  # walk back step by step
        traits=("dreamy", "forgetful", "absent-minded", "hasty"),
        ideas=templates("""
- "Let us walk back the way you came," said {F}. "Where did you go first?" {H} closed {his} eyes and thought.
- "Think," said {F}. "Where did you have it last?" {H} remembered, and together they followed {his} footsteps
  backward.
- {F} drew {the_place} with a stick on the ground. "Show me every step," said {F}, and {H} pointed.
"""),
        finds=templates("""
- They went back step by step. And there, {spot}, was the {thing}!
- Near the very first step they stopped. The {thing} was {spot}, just where {H} had been that {time}.
- After [nine|twelve|twenty] steps, {H} shouted. {Spot}, the {noun} was waiting.
"""),
        lessons=templates("""
- Now {H} knew that it helps to stop and think before running about.
- {H} learned that a calm head finds more than hurried feet.
- "When you are lost in worry, go back one step at a time," said {F}, and {H} [agreed|nodded].
"""),
    ),
    Plot(  # do not give up
        traits=("impatient", "restless", "quick-tempered", "fidgety"),
        ideas=templates("""
- Together they searched [high and low|for a long while]. "I give up," said {H} and kicked a pebble. "Just one more
  place," said {F} {softly}.
- After a while, {H} wanted to go home. But {F} shook {fhis} head and said, "We have not looked everywhere yet."
- "It is hopeless!" groaned {H}. "[Nothing is hopeless|Let us count to ten and try again]," said {F}.
"""),
        finds=templates("""
- So they tried once more, very {carefully}. {Spot}, something caught the light. It was the {thing}!
- They searched on and on. At the very last place, {spot}, {H} saw the {thing}.
- One place was left. {H} took a deep breath and looked {spot}. There lay the {noun}!
"""),
        lessons=templates("""
- {H} learned that those who keep trying often win in the end.
- Now {he} knew that patience is stronger than anger.
- "You see, giving up is never the answer," said {F}. {H} [never forgot those words|knew it was true].
"""),
    ),
    Plot(  # ask for help
        traits=("shy", "timid", "proud", "quiet", "bashful"),
        ideas=templates("""
- At first {H} did not want to say anything. Then {he} took a deep breath and asked, "Will you help me find my
  {noun}?" "[Of course|Certainly|With pleasure]!" said {F}.
- {H} blushed. It was hard for {him} to ask. "Could you help me, please?" {he} said at last. {F} beamed and put {fhis}
  arm around {H}.
- "I can do it alone," muttered {H}. But {he} could not. "Please help me," {he} said, and {F} was ready at once.
"""),
        finds=templates("""
- Four eyes see more than two. {F} looked high and {H} looked low, and {spot} they found the {thing}.
- [{F} searched on the left and {H} on the right|{F} went around one side and {H} around the other]. "Here it
  is!" {F} called. The {noun} was {spot}.
- It did not take long. {Spot}, {H} saw the {thing}, [safe and sound|without a scratch].
"""),
        lessons=templates("""
- {H} learned that asking for help is not weak but wise.
- Now {H} knew that nobody has to do everything alone.
- "You only had to ask," said {F}. {H} [smiled shyly|understood], and next time {he} would ask sooner.
"""),
        is_hard_to_tell=True,
    ),
    Plot(  # a small creature has it
        traits=("curious", "lively", "playful", "merry"),
        ideas=templates("""
- "[Hush|Listen]," said {F}. "Do you hear that?" Somewhere near, something [peeped|squeaked|rustled].
- {F} bent down and pointed at the ground with {fhis} {fhand}. "Look, there are tiny tracks," {F} whispered.
- "Maybe somebody small borrowed it," said {F} and put a finger to {fhis} lips.
"""),
        finds=templates("""
- There, {spot}, sat a {creature} that would not let go of the {thing}. "It wants company," said {H} and [stroked its
  feathers|fed it some crumbs].
- {Spot}, they found a {creature}. It had been guarding the {noun} like an egg. {H} was not angry and gave it a shiny
  leaf to keep instead.
- A {creature} blinked at them {spot}, right beside the {thing}. "You may play with me," {H} told it {softly}, "but
  please ask first."
"""),
        lessons=templates("""
- {H} learned that a kind word works better than a scolding.
- Now {H} knew that even the smallest neighbor wants a friend.
- "You were gentle," said {F}, "and gentleness opens every heart." {H} [was proud|believed it].
"""),
        sizes="tcbm",
    ),
    Plot(  # an honest finder
        traits=("trusting", "friendly", "good-natured", "polite"),
        ideas=templates("""
- "Let us ask around," said {F}. So they asked [everyone they met|left and right].
- {F} cupped {fhis} {fhands} and called, "Has anyone seen a {thing}?"
- "Somebody must have seen it," said {F}. They asked one neighbor, and another, and one more.
"""),
        finds=templates("""
- "I found a {thing} {spot}," said {the_finder}, "and I kept it safe for you." {H} could hardly believe it.
- {The_finder} came closer and smiled. "Is this yours? It lay {spot}." It was the {thing}!
- "What a lucky day," said {the_finder}. "I picked up a {noun} {spot}. I was waiting for its owner."
"""),
        lessons=templates("""
- {H} learned that honest people make the world a better place.
- Now {H} knew what {he} would do if {he} ever found something: {he} would give it back.
- "Honesty is worth more than gold," said {F}, and {H} thought so, too.
"""),
    ),
    Plot(  # a place for everything
        traits=("messy", "careless", "untidy", "scatterbrained"),
        ideas=templates("""
- "Did you put it somewhere safe?" asked {F}. {H} frowned. Then {his} eyes grew wide. {He} remembered!
- "What were you doing before?" asked {F}. "I needed both {hands}," said {H}. "So I put the {noun} away. But where?"
- {F} folded {fhis} arms and waited while {H} tried to remember.
"""),
        finds=templates("""
- {He} had put the {noun} {spot} so that it would not get dirty. And there it was!
- "I hid it myself!" laughed {H}. They ran and looked {spot}. The {thing} was still there.
- At last it came back to {him}. The {thing} was {spot}, because {he} had left it there and never picked it up.
"""),
        lessons=templates("""
- {H} learned that everything needs a place of its own.
- That evening {H} tidied [every drawer|{his} whole room|every corner], and it felt wonderful.
- "A place for everything," said {F}, "and everything in its place." {H} promised to [try|remember].
"""),
    ),
    Plot(  # do not blame
        traits=("hot-headed", "grumpy", "stubborn", "bossy"),
        ideas=templates("""
- "You took it!" shouted {H}. {F} was hurt and lowered {fhis} eyes. "No, I did not," said {F}. "But I will help you
  look."
- {H} pointed at {F}. "Did you hide my {noun}?" {F} shook {fhis} head sadly, but {fhe} began to search all the same.
- "Somebody must have stolen it, and I think it was you," grumbled {H}. {F} was silent for a moment. Then {F} said, "I
  would never do that. Come, let us look."
"""),
        finds=templates("""
- It was not stolen at all. {Spot}, {H} found the {thing}, and {his} ears turned red. "I am sorry," {he} said.
- "There it is!" said {F} and pointed. The {noun} was {spot}. {H} felt ashamed. "Please forgive me," {he} said.
- They found the {thing} {spot}, where nobody had touched it. "I was unfair to you," said {H}. {F} forgave it at once.
"""),
        lessons=templates("""
- {H} learned to ask first and never to blame without a reason.
- Now {H} knew that sorry is a small word with great power.
- "Friends make mistakes," said {F}, "and friends forgive." {H} was [thankful|glad] for such a friend.
"""),
        friend_from_start=True,
    ),
    Plot(  # sharing
        traits=("selfish", "spoiled", "greedy", "jealous"),
        ideas=templates("""
- "May I hold it when we find it?" asked {F}. {H} looked at the ground. {He} had never let anyone touch the {noun}.
- {H} had always said, "It is mine, you may not have it." Even so, {F} [bent down|got on {fhis} knees] and looked
  {carefully}.
- {F} had never been allowed to play with the {noun}, but {fhe} said, "I will help you anyway."
"""),
        finds=templates("""
- It was {F} who saw the {thing} {spot}. "Here, it is yours," said {F}. {H} [blushed|swallowed]. "No, now it is our
  turn together," {he} said.
- {Spot}, they saw the {thing} at the same moment. {H} picked it up and put it right into the {fhands} of {F}.
- At last they found the {thing} {spot}. "You have it first," said {H} {softly}. {F} could not believe {fhis} ears.
"""),
        lessons=templates("""
- {H} learned that a treasure is twice as lovely when it is shared.
- Now {H} knew that sharing makes two people happy at once.
- "It is more fun with two," said {F}. {H} wondered why {he} had not seen that before.
"""),
        friend_from_start=True,
    ),
    Plot(  # being brave
        traits=("fearful", "nervous", "jumpy", "anxious"),
        ideas=templates("""
- Only one spot was left, and it was dark there. "I am afraid," whispered {H}. {F} held out {fhis} {fhand}. "We will
  go together."
- Something creaked in a dark corner, and {H} trembled. "Courage," said {F}. "Hold on to me, and we
  will look at it together."
- "One corner is left, but there may be a monster in it," said {H} with a shiver. {F} lifted {fhis} chin. "Then we
  will say hello to it," said {F}.
"""),
        finds=templates("""
- {H} took one small step, and then another. {Spot}, there was no monster at all, only the {thing}.
- Step by step they went on. {H} opened {his} eyes. The {thing} was {spot}, and nothing there could bite.
- {His} knees shook, but {he} looked {spot}. The dark shape was only the {thing}!
"""),
        lessons=templates("""
- {H} learned that being brave means being scared and going on anyway.
- Now {H} knew that fear grows smaller when a friend is near.
- "You were braver than a lion," said {F}. {H} stood [very straight|a bit taller].
"""),
    ),
    Plot(  # kindness comes back
        traits=("warm-hearted", "generous", "caring", "tender"),
        ideas=templates("""
- But {F} had trouble, too. {F} had dropped {fhis} basket, and [plums|buns|nuts|potatoes] rolled everywhere. {H}
  helped to pick up every one of them. "Now let me help you," said {F}.
- {H} saw that {F} was limping because of a splinter, and pulled it out very gently. "Now it is my turn to help," said
  {F}.
- {F} had a heavy cart to push. {H} forgot the {noun} for a while and pushed, too. "You helped me, and now I will help
  you," said {F}.
"""),
        finds=templates("""
- And when {H} looked up, there was the {thing}, {spot}. Without stopping to help, {he} would have walked right past
  it.
- They had hardly begun when {F} noticed the {thing} {spot}.
- Together they searched {carefully}. {Spot}, they found the {thing}.
"""),
        lessons=templates("""
- {H} learned that kindness always finds its way back.
- Now {H} knew that a good deed is never wasted.
- "Whoever helps others is never alone," said {F}, and {H} felt warm inside.
"""),
    ),
)
