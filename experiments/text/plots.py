"""The rules of the story grammar: every symbol with its alternatives, all equally likely.

`<symbol>` is replaced by one of the symbol's alternatives, `{slot}` by somebody or something that
was drawn for the whole story, so that what is named early is named again, rightly, much later.
A slash begins a paragraph.
"""


def read_rules(text: str) -> dict[str, tuple[str, ...]]:
    """Read `symbol:`, then its alternatives, each of which begins with a dash.

    >>> read_rules("greeting:\\n- Hello,\\n  {hero}! /\\n  Bye!\\n- Ho!")
    {'greeting': ('Hello, {hero}!\\nBye!', 'Ho!')}
    """
    rules: dict[str, list[str]] = {}
    alternatives: list[str] = []
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("- "):
            alternatives.append(line[2:])
        elif line.startswith("  "):
            alternatives[-1] += line[1:]
        else:
            alternatives = rules[line.removesuffix(":")] = []
    return {
        symbol: tuple(found.replace(" / ", "\n") for found in alternatives)
        for symbol, alternatives in rules.items()
    }


RULES = read_rules("""
story:
- <lost>
- <swaps>
- <errand>
- <password>
- <promise>
- <hiding>

# Ways to begin, which the plots share.
opening:
- Once upon a time there was a {trait} {child} called {hero}.
- There once lived a {trait} {child} whose name was {hero}.
- {hero} was a {trait} {child} who lived near {home}.
- In a house near {home} lived {hero}, who was a very {trait} {child}.
day:
- One {weather} day
- On a {weather} morning
- One {weather} afternoon
- On the first {weather} day of the year
went:
- went to
- walked to
- ran all the way to
- set out for
said:
- said
- said
- called
- answered
happy:
- happy
- glad
- proud
- full of joy
sad:
- sad
- worried
- upset
- close to tears

# Somebody loses a present; the story remembers who gave it, what it looks like, where it lay.
lost:
- <opening> <gift> / <day> {hero} and {hero.their} friend {friend} <went> {place}. <loss> /
  <search> / <found> / <homecoming>
gift:
- {hero.They} had {toy.a}, a present from {hero.their} {elder}, and took it everywhere.
- {hero.Their} {elder} had given {hero.them} {toy.a}, and {hero} loved it dearly.
- For {hero.their} birthday {hero} got {toy.a} from {hero.their} {elder}.
loss:
- There they played until the sun was low. Then {hero} stopped. "Oh no! My {toy} is gone!"
- They climbed and sang and had a lovely time. But soon {hero} cried, "Where is my {toy}?"
- {hero} put the {toy} down to tie a shoe, and forgot it. When {hero.they} came back, it was not
  there.
search:
- {hero} was <sad>. {friend} took {hero.their} hand. They looked {spot2}, but there was only
  {thing2.a}. They looked {spot3}, but there was nothing at all.
- "I will help you," <said> {friend}. First they looked {spot3}, then {spot2}. All they found was
  {thing2.a}, and that was not the right thing.
- {friend} stayed calm. "Let us think," {friend.they} said. They searched {spot2} and then {spot3},
  but all they saw was {thing2.a}.
found:
- Then {animal.a} came by. "I saw {toy.a} {spot}," <said> the {animal}. And so it was: there lay
  the {toy}, {spot}.
- At last {friend} looked {spot}. "Here it is!" {friend.they} called, and held up the {toy}.
- {hero} closed {hero.their} eyes and remembered. {hero.They} walked straight back and found the
  {toy} {spot}.
homecoming:
- At home {hero.their} {elder} asked, "Where is the {toy.noun} that I gave you?" {hero} smiled and
  held up the {toy}. "It was {spot}," {hero.they} said. "{friend} helped me."
- That night {hero} told {hero.their} {elder} how the {toy} had been lost at {place}, and how it
  was found {spot}. {hero.They} was <happy> to have a friend like {friend}.
- "Thank you, {friend}," <said> {hero}. From then on {hero.they} never left the {toy} of
  {hero.their} {elder} behind again.

# Three friends swap what they have; at the end somebody must know who owns what.
swaps:
- {hero}, {friend} and {pal} were friends. {hero} had {toy.a}, {friend} had {thing2.a} and {pal}
  had {thing3.a}. / <day> they met at {place}. <swap1> <swap2> / <owners>
- Three friends met at {place}. {friend} brought {thing2.a}. {pal} brought {thing3.a}. {hero}
  brought {toy.a}. / <swap1> / <swap2> / <owners>
swap1:
- "May I have your {taken1}?" {giver1} asked {taker1}. "I will give you my {given1}." {taker1}
  nodded, and they swapped.
- {giver1} liked the {taken1} of {taker1} very much, so {taker1} took the {given1} and {giver1}
  took the {taken1}.
- {taker1} looked at the {given1}. {giver1} looked at the {taken1}. They laughed and swapped.
swap2:
- A little later {giver2} said, "{taker2}, let us swap too." So {taker2} got the {given2} and
  {giver2} got the {taken2}.
- After lunch {giver2} gave the {given2} to {taker2} and got the {taken2} for it.
- Then {giver2} and {taker2} made a swap. The {given2} went to {taker2}, and the {taken2} went to
  {giver2}.
owners:
- When they went home, {owner1} had the {owned1}, {owner2} had the {owned2} and {owner3} had the
  {owned3}. All three were <happy>.
- "Now who has what?" asked the {elder} of {hero}. {owner1} showed the {owned1}. {owner2} showed
  the {owned2}. {owner3} showed the {owned3}.
- On the way home they met {animal.a}. "What have you got there?" it asked. "I have the {owned1},"
  <said> {owner1}. "I have the {owned2}," <said> {owner2}. "And mine is the {owned3}," <said>
  {owner3}.

# Three things to fetch, which come back in order.
errand:
- <opening> / <day> {hero.their} {elder} said, "{hero}, please bring me {toy.a}, {thing2.a} and
  {thing3.a}." <repeat> / <fetch1> <fetch2> <fetch3> / <brought>
repeat:
- "The {toy}, the {thing2}, the {thing3}," said {hero} again and again, so as not to forget.
- {hero} counted them on three fingers and <went> {place}.
- "I will not forget," said {hero}, and {hero.they} <went> {place}.
fetch1:
- The {toy} lay {spot}. That was easy.
- {hero} soon found the first thing {spot}.
- "Look {spot}," said {animal.a}, and there {hero} found the {toy}.
fetch2:
- The second thing was harder, but {friend} had seen it {spot2}.
- The {thing2} was {spot2}, a little dusty.
- Then {hero.they} met {friend}, who had the {thing2} and gave it to {hero.them}.
fetch3:
- And the {thing3}? It was {spot3}.
- The last thing was {spot3}. {hero.They} picked it up and ran.
- {hero} looked for the {thing3} for a long time, until {hero.they} saw it {spot3}.
brought:
- "Here they are," said {hero}: "the {toy}, the {thing2} and the {thing3}." {hero.Their} {elder}
  was <happy>, and they ate {treat}.
- At home {hero} put the {toy}, the {thing2} and the {thing3} on the table. "You remembered
  everything!" said {hero.their} {elder}. "Now let us have some {treat}."
- {hero.Their} {elder} took the {thing3} first, then the {thing2}, and last of all the {toy}.
  "Thank you, {hero}," {elder.they} said. There was {treat} for supper.

# Words that must be kept in mind and said again.
password:
- <opening> {hero.They} wanted to visit the {animal} who lived {spot}. / "You must say the secret
  words," said {hero.their} {elder}. "They are: {secret1}, {secret2}, {secret3}. <way>
way:
- Say them and the {animal} will let you in." / <distraction> / <door>
- Do not tell anybody but the {animal}." / <distraction> / <door>
distraction:
- On the way {hero} met {friend}, who was playing with {toy.a}. "Come and play!" called {friend}.
  They played at {place} for an hour, and then {hero} went on.
- It was {weather}, and the way was long. {hero.They} saw {thing2.a} {spot2} and {thing3.a}
  {spot3}, but {hero.they} did not stop.
- {hero} <went> {place} first, to buy {treat}. "What are the words?" asked {friend}. But {hero}
  only smiled and walked on.
door:
- The {animal} looked out. "What are the secret words?" it asked. "{secret1.start}, {secret2},
  {secret3}," <said> {hero}, and the door opened. Inside there was {treat} for two.
- Soon {hero} stood {spot} and knocked. "Who is there?" asked the {animal}. "It is {hero}, and the
  words are {secret1}, {secret2}, {secret3}." "Come in, {hero}!" <said> the {animal}.
- The {animal} had sharp ears. "Say the words backwards," it said. {hero} thought hard.
  "{secret3.start}, {secret2}, {secret1}." The {animal} laughed and let {hero.them} in.

# A promise made in the first lines is kept in the last.
promise:
- <opening> {hero.Their} best friend was {friend}, who was ill and had to stay in bed. / <vow> /
  <temptation> / <kept>
vow:
- "I will bring you {toy.a} from {place}," said {hero}. "And some {treat}," said {friend}.
- "What would you like from {place}?" asked {hero}. "{toy.A}," said {friend}, "and {treat}."
- {friend} wished for {toy.a} and a little {treat}. "I promise," said {hero}, and {hero.they}
  <went> {place}.
temptation:
- At {place} {hero.they} saw {thing2.a}. How {hero.they} would have liked to have it! But there was
  not enough money for both.
- At {place} {hero} met {pal}. "Stay and play with my {thing2}," <said> {pal}. It was a {weather}
  day, and {hero} wanted to stay.
- The way was long. {hero.They} sat down {spot}, and {animal.a} told {hero.them} a story about
  {thing3.a}. It was a very long story.
kept:
- But {hero} thought of {friend}. {hero.They} bought the {toy} and the {treat} and took them to
  {friend}, who was <happy> and soon well again.
- "I made a promise," <said> {hero}. That evening {friend} had the {toy} in one hand and some
  {treat} in the other.
- Still, a promise is a promise. {friend} was asleep, so {hero} put the {toy} beside the bed and
  left the {treat} with {friend.their} {elder}.

# Something is hidden, other things happen, and somebody must say where it is.
hiding:
- <opening> / <day> {hero} and {friend} played at {place}. "I will hide my {toy}," said {hero},
  "and you will hide your {thing2}." {hero} hid the {toy} {spot}. {friend} hid the {thing2}
  {spot2}. / <interruption> / <question>
- {hero} had {toy.a} and {friend} had {thing2.a}. They lived near {home}. / <day> they hid their
  things at {place}: {hero} went first and hid the {toy} {spot}, then {friend} hid the {thing2}
  {spot2}. / <interruption> / <question>
interruption:
- Then it began to rain. They ran home, had {treat} and listened to the wind. {friend} fell asleep
  in a chair.
- Just then {pal} came with {thing3.a}, and they all played with it until {hero.their} {elder}
  called them in for {treat}.
- {animal.A} came by and asked for some {treat}. They talked with it for a long time, and the
  {animal} sang a song about {thing3.a}.
question:
- "Where did I put my {toy}?" asked {hero} in the end. "{spot.start}," <said> {friend}. "And my
  {thing2}?" "{spot2.start}," <said> {hero}.
- "Now find my {thing2}," said {friend}. {hero} looked {spot2}, and there it was. Then {friend}
  looked {spot} and found the {toy}.
- The next day they had to think hard. Was the {toy} {spot2}? No, that was where the {thing2} was.
  The {toy} was {spot}. They were <happy> to find both.
""")
