"""The sentences that every story of the sample corpus can have: opening, loss, search, meeting, joy, ending.

Data only, read by `grammar`. A template is one or more whole sentences; `[a|b]` is a choice (an empty one leaves
out), `{name}` a word of the story's cast or of a pool. Two rules keep every pronoun decidable (`consistency`):
a sentence that begins with the friend's name `{F}` uses only the friend's pronouns `{fhe} {fhim} {fhis}`, and every
other sentence only the hero's, `{he} {him} {his}`. Quoted speech has neither.
"""


def templates(text: str) -> tuple[str, ...]:
    """One template per "- " bullet; a bullet may run over several lines."""
    return tuple(" ".join(bullet.split()) for bullet in text.split("\n- ")[1:])


OPENINGS = templates("""
- Once upon a time, there [was|lived] a {trait} {kind} [named|called] {H}.
- Once upon a time, in {village}, there lived a {trait} {kind} [named|called] {H}.
- {H} was a {trait} {kind} who lived in {village}.
- In {village} [lived|there lived] a {kind} [named|called] {H}, and everyone knew that {he} was {trait}.
- Long ago, when [grandparents were still small|the hills were young], a {trait} {kind} named {H} lived in {village}.
- There was once a {kind} called {H}. {He} was {trait}, and {he} had [the brightest eyes|the loudest laugh|the
  quickest feet] in the whole valley.
- Not [far|so far] from here, in {village}, lives {H}. When {he} was still a [little|small|very young] {kind}, {he}
  was {trait}.
- Do you know {H}? {He} was a {trait} {kind} from {village}.
- This is the story of {H}, a {trait} {kind}, and of a {thing}.
- Have you heard how {H} [almost|nearly] lost a {thing} forever? {He} was a {trait} {kind} from {village}.
""")

CRIES = templates("""
- "Oh no, where is my {thing}?" cried {H} one {weather} {time}. {He} was a {trait} {kind} from {village}.
- One {weather} {time}, {H}, a {trait} {kind}, [looked around|turned {his} {bag} inside out|stood quite still]. "My
  {thing} is gone!" {he} [whispered|cried|gasped].
- One {weather} {time}, {H} could not find {his} {thing}. {H} was a {trait} {kind} from {village}.
- "It was here a minute ago!" said {H}, a {trait} {kind} from {village}. But the {thing} was gone.
""")

BELONGINGS = templates("""
- {H} owned a {thing}. {origin} {He} loved to {use}.
- {His} greatest treasure was a {thing}. {origin} [Every day|Every evening|Whenever {he} could], {he} loved to {use}.
- Of all the things in {his} [room|home], {H} loved {his} {thing} best. {origin}
- {He} never went anywhere without {his} {thing}, because {he} loved to {use}. {origin}
- {H} had a {thing}, and {he} loved to {use}.
- What {H} liked most was {his} {thing}. {origin} How {he} loved to {use}!
""")

ORIGINS = {
    "given": templates("""
- It was a [birthday|surprise|New Year's|farewell] present from {his} {giver}.
- {His} {giver} had given it to {him} [for being so brave|on {his} last birthday|after a long journey].
- It had once belonged to {his} {giver}.
"""),
    "sewn": templates("""
- {His} {giver} had made it [stitch by stitch|with needle and thread|during the long winter evenings].
- It was made of [the softest wool|leftover cloth|cotton and yarn] by {his} {giver}.
"""),
    "carved": templates("""
- {His} {giver} had carved it from [a piece of birch|an oak branch|cherry wood].
- It was carved with a [small|sharp] knife by {his} {giver}.
"""),
    "made": templates("""
- {He} had made it [with glue and patience|all by {himself}|together with {his} {giver}].
- It had taken {him} and {his} {giver} a whole [week|weekend] to make it.
"""),
    "found": templates("""
- {He} had found it [on a long walk|after a storm|in an attic|at the edge of a stream] and kept it ever since.
- It had come to {him} by chance, [in a pile of pebbles|on a dusty road|at the bottom of an old chest].
"""),
}

OUTINGS_FIRST = templates("""
- One {weather} {time}, a {kind} [named|called] {H} [went to|walked to|set out for] {the_place} with a {thing}. {now}
- It was a {weather} {time}. {now} {H} [walked|skipped|hurried|strolled] to {the_place}, and with {him} came a
  {thing}.
- On a {weather} {time}, {H} [took|packed|grabbed] a {thing} and [ran|marched|wandered] to {the_place}.
  {now}
- {now} "What a {weather} {time}!" said {H}, picked up a {thing}, and went to {the_place}.
""")

INTRODUCTIONS = templates("""
- {H} was a {trait} {kind} from {village}.
- {He} was {trait}, [as everybody knew|as {his} {giver} often said|and {he} knew it], and {he} lived in {village}.
- {H} was known in the whole valley as a very {trait} {kind}.
""")

KNOWN_BELONGINGS = templates("""
- The {noun} was {his} greatest treasure. {origin} {He} loved to {use}.
- {H} loved that {noun} more than anything. {origin}
- {H} was fond of the {noun}. {origin} {He} loved to {use}.
- {He} never went anywhere without the {noun}, because {he} loved to {use}.
""")

DOINGS = templates("""
- {H} {doing1} and {doing2}.
- First {he} {doing1}, and after that {he} {doing2}.
- {He} {doing1} [until {he} was hungry|for a long while].
""")

OUTINGS = templates("""
- One {weather} {time}, {H} went to {the_place} [with {his} {noun}|and took the {noun} along]. {now} {He} {doing1} and
  {doing2}.
- It was a {weather} {time}. {now} {H} [walked|skipped|hurried|strolled] to {the_place} with the {noun}. There {he}
  {doing1}, and then {he} {doing2}.
- {now} It was just the right {time} for a trip to {the_place}, and the {noun} came along, too. {H} {doing1}.
- On a {weather} {time}, {he} carried the {noun} to {the_place}. {He} {doing1} [until {he} was hungry|for a long
  while], and after that {he} {doing2}.
- One {time}, {his} {giver} took {H} to {the_place}. {now} With the {noun} [close by|at {his} side], {he} {doing1}.
""")

# The same hour told afterwards, for a story that begins with the loss.
FLASHBACKS = templates("""
- That {time}, {he} had been {at_place} with the {noun}. {now}
- {now} {He} had spent the whole {time} {at_place}, and the {noun} had been there all along.
- {He} had taken it to {the_place} that {time}. {now}
""")

LOSSES = {
    "t": templates("""
- But somewhere on the way, the {noun} slipped out of {his} {bag}.
- {He} did not notice the hole in {his} {bag}. When {he} [felt for|reached for] the {noun}, it was gone.
- With a tiny clink, the {noun} dropped to the ground, and {H} did not hear it.
"""),
    "c": templates("""
- Then a [sudden|strong|cheeky] gust of wind snatched the {noun} and [carried|whirled] it away.
- {He} put the {noun} down for a moment. When {he} turned around, it was gone.
- It grew so warm from all that playing that {he} laid the {noun} aside and forgot where.
"""),
    "b": templates("""
- Then the {noun} [bumped|bounced] against a stone and rolled out of sight.
- {He} gave the {noun} a push, and it rolled faster and faster until {he} could not see it anymore.
- {H} tripped over {his} own feet, and the {noun} rolled away.
"""),
    "m": templates("""
- {He} put the {noun} down to tie a knot, and then {he} forgot all about it.
- When it was time to go home, {his} {hands} were empty. The {noun} was gone.
- {H} set the {noun} down for a moment, [wandered off|ran ahead], and could not remember where it was.
"""),
    "f": templates("""
- Then a puff of wind lifted the {noun} out of {his} {hands}.
- Somewhere along the path, the {noun} slid out of {his} {bag}.
- {He} laid the {noun} down for a moment, and when {he} looked again, it was gone.
"""),
}

FEELINGS = templates("""
- {H} felt {sad}.
- {H} was so {sad} that {he} [sat down on the ground|could hardly breathe|forgot {his} snack].
- A [big|hot|round] tear rolled down {his} [cheek|nose].
- {His} [heart|tummy] felt [heavy|like a cold stone]. "What shall I do now?" {he} [sighed|mumbled|wondered].
- {H} [bit {his} lip|swallowed hard|let {his} shoulders droop]. {He} felt {sad} and a little [tired|scared|lost].
- "[It cannot be far|It must be here somewhere|Please come back to me]," {he} [whispered|murmured|sniffed].
""")

SHORT_SEARCHES = templates("""
- {H} looked {wrong1} and then {wrong2}, but found only a {decoy1}.
- {H} searched {wrong1}, but there was no {noun}.
- "Is it {wrong1}?" {H} wondered. It was not.
- {H} could not find it, [neither {wrong1} nor {wrong2}|no matter where {he} looked].
""")

SEARCHES = templates("""
- {H} looked {wrong1}, but there was only a {decoy1}. {He} looked {wrong2}, but there was nothing at all.
- First {H} searched {wrong1}. Then {he} searched {wrong2}. All {he} found was a {decoy1}.
- {H} crawled around and looked {wrong1}. "Hello," said {H} to a {decoy1}, but it did not answer.
- Was it {wrong1}? No, there was just a {decoy1}. Was it {wrong2}? No, {H} saw just a {decoy2}.
- {He} [hunted|looked|checked] {wrong1} and even {wrong2}, but {H} could see no {noun}.
- {H} searched {wrong1} until {his} knees were [dirty|muddy|sore]. There was a {decoy1}, but no {noun}.
""")

MEETINGS = templates("""
- {F} {ffrom} was [passing by|on the way home|out for a walk]. "[Why do you look so {sad}|What is the matter|Can I
  help you], {H}?" {F} asked {softly}.
- Just then, {F} {ffrom} came along. {F} had brought {fhis} [basket|jump rope|new boots|picnic]. "What
  happened, {H}?" asked {F}.
- {F} {ffrom} heard the [sniffling|sighing|noise] and [stopped|hurried over|put down {fhis} bundle]. "You look {sad},
  {H}," said {F}.
- Before long, {H} met {F} {ffrom}. {F} was a {nice} {fkind}. {F} scratched {fhis} [chin|head|nose] and asked, "[Is
  something wrong|What are you looking for]?"
- Then {F} {ffrom} sat down [beside|next to] {H}. "You look {sad}," {F} said {softly}.
- "Do you need another pair of eyes?" called a {nice} voice. It was {F} {ffrom}. {F} [wiped {fhis} {fhands}|tightened
  {fhis} belt|rolled up {fhis} sleeves] and sat down beside {H}.
""")

ANSWERS = templates("""
- "[I lost my {noun}|My {noun} is gone|I cannot find my {noun}]," [said|answered|sighed] {H}.
- {H} told {F} [about the {noun}|the whole story|what had happened].
""")

COMPANIONS = templates("""
- {F} {ffrom} had come along, too. {F} was a {nice} {fkind}.
- {H} was not alone, for {F} {ffrom} was there as well. {F} was a {nice} {fkind} who liked to hum to {fhimself}.
- With {him} was {F} {ffrom}, a {nice} [friend|companion|playmate].
""")

JOYS = templates("""
- {H} hugged the {noun} and then hugged {F}. "Thank you!" {he} [cried|cheered|laughed].
- {H} [jumped up and down|clapped {his} {hands}|danced in a circle]. {He} had never felt so {glad}.
- "Hooray!" shouted {H}. {F} laughed and clapped {fhis} {fhands}.
- {His} face shone like a [lamp|candle|full moon]. "I am so {glad}!" {he} said.
- {F} grinned, and {H} held the {noun} tight. They were both {glad}.
""")

TREATS = templates("""
- Afterwards they shared {snack} and told each other [jokes|stories|secrets].
- {H} invited {F} home, and they had {snack} together.
- To celebrate, {H} brought {snack}. {F} smacked {fhis} lips.
- {F} blushed when {H} gave {fhim} a big piece of cake.
""")

ENDINGS = templates("""
- From that day on, {H} [never forgot it|remembered that] and took good care of {his} {noun}.
- That night, {H} fell asleep with the {noun} [beside|next to] {him} and a smile on {his} face.
- And whenever {H} looked at the {noun}, {he} thought of {F} and smiled.
- {F} and {H} walked home side by side, and the {noun} was safe in the {hands} of {H}.
- {H} never lost the {noun} again, and {he} and {F} stayed the best of friends.
- When the stars came out, {H} put the {noun} in its place and felt {glad}.
- And so {H} went home with the {noun}, {glad} and a little bit wiser.
""")
