"""What the slots of the corpus may hold, and the people who talk: names of many cultures and made-up ones.

About a tenth of each list never occurs in training: `training_values` and `held_out_values` part it for good.
"""

from __future__ import annotations

import random
import zlib
from functools import cache

SLOTS: dict[str, list[str]] = {
    name: [value.strip() for value in values.replace("\n", ",").split(",") if value.strip()]
    for name, values in {
        "food": """pizza, sushi, pasta, lasagna, ramen, tacos, curry, pancakes, waffles, fried rice, soup,
        salad,
            dumplings, burgers, noodles, chocolate, cheese, bread, burritos, paella, risotto, pierogi,
            falafel, hummus,
            kebab, gnocchi, spaghetti, potatoes, fries, popcorn, omelettes, goulash, couscous, chili, nachos,
            donuts,
            cookies, ice cream, apple pie, cheesecake, brownies, sandwiches, steak, roast chicken,
            fish and chips,
            stew, quiche, crepes, ravioli, meatballs, kimchi, bibimbap, pho, biryani, dosa, samosas, tofu,
            lentils,
            porridge, toast, muffins, pretzels, tiramisu, pudding, jollof rice, empanadas, schnitzel,
            borscht, moussaka,
            spring rolls, mac and cheese, garlic bread, baklava, shakshuka, fondue, pad thai, katsu, oysters,
            shrimp""",
        "drink": """coffee, tea, green tea, orange juice, lemonade, hot chocolate, water, milk, cola,
        iced tea, cocoa,
            apple juice, smoothies, espresso, mint tea, sparkling water, ginger beer, milkshakes, chai,
            matcha, cider,
            black coffee, ginger tea, coconut water, root beer, tomato juice, cappuccino, oat milk,
            herbal tea""",
        "animal": """cat, dog, horse, rabbit, panda, penguin, dolphin, elephant, tiger, lion, fox, wolf, owl,
        parrot,
            turtle, snake, frog, hamster, koala, giraffe, zebra, bear, otter, squirrel, hedgehog, whale,
            shark, octopus,
            eagle, duck, goat, sheep, cow, pig, donkey, camel, llama, alpaca, monkey, gorilla, cheetah,
            leopard, raccoon,
            deer, moose, seal, walrus, crow, raven, swan, flamingo, peacock, bee, butterfly, spider, lizard,
            crab,
            beaver, badger, bat, kangaroo, sloth, lynx, ferret, goose, meerkat, lemur, jellyfish, salmon""",
        "color": """blue, red, green, yellow, purple, orange, pink, black, white, gray, brown, turquoise,
        gold, silver,
            violet, teal, navy blue, lavender, beige, maroon, dark green, light blue, crimson, cyan, magenta,
            indigo,
            olive green, coral, mint green, burgundy, sky blue, scarlet, ivory, emerald, peach,
            mustard yellow""",
        "hobby": """painting, hiking, reading, cooking, dancing, gardening, knitting, photography, fishing,
        singing,
            drawing, writing, baking, cycling, running, swimming, camping, chess, gaming, coding, traveling,
            yoga,
            climbing, collecting stamps, bird watching, pottery, sewing, woodworking, playing guitar,
            skateboarding,
            surfing, skiing, origami, juggling, stargazing, board games, calligraphy, sculpting, blogging,
            crocheting,
            horse riding, scuba diving, learning languages, meditation, archery, rowing, playing piano, karaoke,
            model trains, magic tricks, people watching, restoring cars, making jewelry, beekeeping,
            geocaching""",
        "sport": """football, soccer, basketball, tennis, baseball, volleyball, hockey, rugby, golf,
        swimming, boxing,
            cricket, badminton, table tennis, skiing, snowboarding, running, cycling, judo, karate, handball,
            surfing,
            wrestling, fencing, rowing, gymnastics, climbing, archery, skating, softball, water polo, darts,
            bowling,
            lacrosse, curling, squash, sailing, triathlon, diving, billiards""",
        "city": """Paris, London, Berlin, Madrid, Rome, Vienna, Prague, Warsaw, Lisbon, Dublin, Oslo,
        Stockholm, Helsinki,
            Copenhagen, Amsterdam, Brussels, Athens, Budapest, Zurich, Barcelona, Munich, Hamburg, Milan,
            Venice, Naples,
            Tokyo, Kyoto, Osaka, Seoul, Beijing, Shanghai, Bangkok, Singapore, Manila, Jakarta, Hanoi, Delhi,
            Mumbai,
            Dubai, Istanbul, Cairo, Nairobi, Lagos, Accra, Cape Town, Casablanca, Sydney, Melbourne,
            Auckland, Toronto,
            Montreal, Vancouver, New York, Chicago, Boston, Seattle, Denver, Austin, Miami, San Diego,
            Portland, Dallas,
            Mexico City, Lima, Bogota, Santiago, Buenos Aires, Havana, Quito, Rio, Edinburgh, Glasgow,
            Manchester,
            Liverpool, Krakow, Porto, Seville, Valencia, Lyon, Nice, Geneva, Salzburg, Riga, Vilnius,
            Tallinn, Sofia,
            Belgrade, Zagreb, Bucharest, Kyiv, Tbilisi, Reykjavik, Bergen, Ghent, Cologne, Dresden, Leipzig,
            Turin""",
        "country": """France, Germany, Spain, Italy, Portugal, Poland, Austria, Switzerland, Norway, Sweden,
        Finland,
            Denmark, Ireland, Scotland, England, Greece, Turkey, Egypt, Morocco, Kenya, Ghana, Nigeria,
            India, Japan,
            China, Korea, Vietnam, Thailand, Indonesia, Australia, New Zealand, Canada, Mexico, Brazil,
            Argentina, Chile,
            Peru, Colombia, Cuba, Iceland, Belgium, Hungary, Romania, Croatia, Ukraine, Georgia, Nepal,
            Bolivia""",
        "job": """teacher, nurse, doctor, engineer, programmer, student, chef, baker, lawyer, driver,
        gardener, artist,
            musician, writer, carpenter, electrician, plumber, mechanic, pilot, farmer, scientist, librarian,
            designer,
            accountant, cashier, waiter, barista, firefighter, police officer, photographer, translator,
            dentist,
            pharmacist, architect, actor, singer, journalist, tailor, hairdresser, cleaner, security guard,
            salesman,
            software developer, truck driver, social worker, vet, painter, welder, biologist, flight attendant,
            data analyst, tour guide, sailor, zookeeper, florist, secretary, butcher, judge""",
        "music": """rock, jazz, pop, hip hop, classical music, techno, country, metal, reggae, blues, folk,
        punk, soul,
            funk, opera, disco, house, indie, rap, electronic music, salsa, ska, lofi, gospel, swing, bluegrass,
            heavy metal, trance, ambient, grunge, flamenco, synth pop, drum and bass, bossa nova""",
        "instrument": """guitar, piano, violin, drums, flute, trumpet, cello, saxophone, clarinet, harp,
        bass, ukulele,
            banjo, accordion, harmonica, trombone, organ, viola, mandolin, recorder, keyboard, bagpipes,
            oboe""",
        "season": "spring, summer, autumn, winter",
        "weekday": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
        "game": """chess, checkers, poker, hide and seek, tag, dominoes, cards, solitaire, tic tac toe,
        hangman, bingo,
            charades, go, backgammon, darts, pool, marbles, jigsaw puzzles, word games, strategy games,
            racing games,
            puzzle games, role playing games, crossword puzzles, sudoku, memory, bridge, truth or dare,
            twenty questions""",
        "fruit": """apple, banana, mango, strawberry, orange, pear, cherry, peach, pineapple, kiwi, melon,
        plum, grape,
            watermelon, raspberry, blueberry, lemon, papaya, apricot, fig, lychee, coconut, pomegranate,
            blackberry""",
        "book_genre": """fantasy, science fiction, crime, romance, horror, history, poetry, mystery,
        adventure, biography,
            comics, thriller, fairy tale, travel, philosophy, detective, western, mythology""",
        "movie_genre": """comedy, horror, action, drama, science fiction, fantasy, romance, animation,
        thriller, mystery,
            adventure, western, documentary, musical, war, crime, superhero, spy, zombie, disaster""",
        "number": """two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fifteen,
        twenty,
            thirty, forty, fifty, a hundred, 7, 13, 42, 99, 12, 5, 21, 64, 100""",
        "mood": """happy, sad, tired, excited, nervous, bored, great, lonely, angry, stressed, calm, sleepy,
        anxious, proud,
            curious, grumpy, relaxed, worried, confused, hopeful, hungry, sick, energetic, overwhelmed,
            cheerful, moody,
            exhausted, inspired, content, frustrated, jealous, grateful, restless, homesick""",
        "age": ", ".join(str(age) for age in range(7, 91)),
        "pet": """cat, dog, hamster, rabbit, parrot, goldfish, turtle, guinea pig, horse, snake, lizard,
        canary, ferret,
            kitten, puppy, mouse, rat, budgie, gecko, hedgehog, pony, frog""",
        "name": """Anna, Ben, Clara, David, Emma, Felix, Grace, Hannah, Ivan, Julia, Karl, Laura, Max, Nina,
        Oscar, Paula,
            Quinn, Rosa, Sam, Tom, Uma, Victor, Wendy, Xavier, Yara, Zoe, Alice, Bob, Charlie, Diana, Ethan,
            Fiona,
            George, Helen, Isaac, Jack, Kate, Liam, Mia, Noah, Olivia, Peter, Rachel, Sarah, Thomas, Ursula,
            Vera, Will,
            Mike, John, James, Robert, Michael, William, Richard, Joseph, Daniel, Matthew, Anthony, Mark,
            Steven, Paul,
            Andrew, Kevin, Brian, Jason, Jeff, Ryan, Jacob, Gary, Nick, Eric, Jonathan, Scott, Justin,
            Brandon, Frank,
            Greg, Patrick, Alex, Dennis, Jerry, Tyler, Aaron, Henry, Adam, Nathan, Zach, Kyle, Walter,
            Jeremy, Sean,
            Mary, Linda, Susan, Jessica, Karen, Lisa, Nancy, Betty, Sandra, Ashley, Emily, Donna, Michelle,
            Carol, Amanda,
            Melissa, Deborah, Stephanie, Rebecca, Sharon, Cynthia, Kathleen, Amy, Angela, Shirley, Brenda,
            Pamela, Nicole,
            Samantha, Katherine, Christine, Debra, Carolyn, Janet, Maria, Heather, Diane, Julie, Joyce,
            Victoria, Kelly,
            Christina, Joan, Evelyn, Lauren, Judith, Megan, Cheryl, Andrea, Martha, Jacqueline, Gloria,
            Teresa, Sophie,
            Madison, Abigail, Natalie, Chloe, Ella, Lily, Ava, Isla, Ruby, Lucy, Freya, Daisy, Poppy, Alfie,
            Archie,
            Hiroshi, Yuki, Sakura, Kenji, Haruto, Aiko, Ren, Sora, Mei, Wei, Jing, Li, Chen, Xiu, Hao, Ming,
            Lan, Min,
            Jisoo, Hyun, Soo, Jin, Minho, Yuna, Raj, Priya, Arjun, Anika, Ravi, Deepa, Sanjay, Lakshmi,
            Vikram, Neha, Amit,
            Kiran, Rohan, Sunita, Aisha, Fatima, Omar, Hassan, Layla, Yusuf, Zainab, Ahmed, Khalid, Noor,
            Samir, Leila,
            Tariq, Salma, Karim, Amina, Ali, Mohammed, Ibrahim, Mustafa, Elif, Emre, Aylin, Mehmet, Deniz,
            Can, Ayse,
            Kwame, Ama, Kofi, Abena, Chidi, Ngozi, Emeka, Adaeze, Tunde, Folake, Zola, Thabo, Sipho, Naledi,
            Amara,
            Wanjiru, Kamau, Achieng, Otieno, Juan, Carlos, Sofia, Diego, Lucia, Miguel, Elena, Pablo, Carmen,
            Javier,
            Mateo, Valentina, Santiago, Camila, Isabella, Luis, Jorge, Fernando, Joao, Pedro, Ines, Beatriz,
            Tiago, Rafael,
            Giulia, Marco, Luca, Francesca, Alessandro, Chiara, Paolo, Giovanni, Pierre, Marie, Jean,
            Camille, Louis,
            Margaux, Antoine, Chantal, Hugo, Manon, Hans, Greta, Klaus, Heidi, Jonas, Lena, Lukas, Wolfgang,
            Ingrid, Sven,
            Bjorn, Astrid, Erik, Freja, Lars, Nils, Olga, Dmitri, Natasha, Sergei, Svetlana, Boris, Tatiana,
            Mikhail, Anya,
            Piotr, Agnieszka, Kasia, Tomasz, Wojtek, Zofia, Jakub, Marek, Petra, Pavel, Milan, Jana, Istvan,
            Katalin, Zoltan,
            Andrei, Ioana, Mihai, Dragan, Milica, Nikola, Jelena, Yannis, Eleni, Kostas, Dimitra, Siobhan,
            Aoife, Cormac,
            Niamh, Declan, Rhys, Megan, Gareth, Carys, Moana, Tane, Aroha, Kai, Leilani, Keanu, Tala, Dakota,
            Cheyenne,
            Rivka, Moshe, Yael, Avi, Noa, Eitan, Arash, Shirin, Reza, Parisa, Darius, Nguyen, Linh, Minh,
            Thuy, Somchai, Malee,
            Putri, Budi, Dewi, Agus, Tenzin, Pema, Bayar, Timur, Aigul, Nurlan, Sasha, Robin, Jordan, Taylor,
            Morgan,
            Casey, Riley, Jamie, Skyler, Avery, Rowan, Sage, River, Phoenix, Frankie, Toni, Billie, Ash,
            Blake, Drew""",
    }.items()
}

PROPER = frozenset(("name", "city", "country", "weekday"))
"""Written with a capital, which many people leave out."""

_ONSETS = [
    *("b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kr", "l", "m", "n", "p", "pr", "qu"),
    *("r", "s", "sh", "st", "t", "th", "tr", "v", "w", "y", "z"),
]
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "a", "ai", "ea", "ee", "ia", "io", "ou"]
_CODAS = ["", "", "", "", "l", "n", "r", "s", "m", "k", "t", "x", "nd", "rn", "th", "lle", "ss", "ck"]


def made_up(rng: random.Random) -> str:
    """A name nobody has, two or three syllables long."""
    syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 2, 2)))]
    first = "" if rng.random() < 0.85 else rng.choice("aeiou")
    return (first + "".join(syllables) + rng.choice(("", rng.choice(_VOWELS))) + rng.choice(_CODAS)).capitalize()


@cache
def made_up_names(count: int = 6000) -> tuple[str, ...]:
    rng = random.Random("names")
    names = dict.fromkeys(made_up(rng) for _ in range(2 * count))
    return tuple(name for name in names if len(name) > 2)[:count]


def is_held_out(value: str) -> bool:
    """The same tenth on every machine."""
    return zlib.crc32(value.lower().encode()) % 10 == 0


@cache
def values(slot: str, *, held_out: bool) -> tuple[str, ...]:
    """What training (or only the evaluation) may put into `slot`. Short lists are not parted: nothing is held out."""
    everything = SLOTS[slot]
    if len(everything) < 20:
        return () if held_out else tuple(everything)
    return tuple(value for value in everything if is_held_out(value) == held_out)


@cache
def names(*, held_out: bool) -> tuple[str, ...]:
    """Made-up first names, parted like the real ones."""
    return tuple(name for name in made_up_names() if is_held_out(name) == held_out)
