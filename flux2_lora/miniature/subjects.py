"""What the bundled miniature can draw: names of emoji (Unicode's), chosen to be told apart without a caption.

COMMON are the fifty that its drawing is judged by; they are trained most, then OTHERS, then all other emoji.
"""

from __future__ import annotations

COMMON = (
    # Plants and food
    *("red apple", "banana", "grapes", "strawberry", "lemon", "watermelon", "carrot", "mushroom", "pizza", "hamburger"),
    *("doughnut", "birthday cake", "ice cream", "hot beverage", "rose", "sunflower", "cactus", "palm tree"),
    # Animals and faces
    *("cat face", "dog face", "panda", "tiger face", "pig face", "frog", "elephant", "penguin", "owl", "fish"),
    *("turtle", "butterfly", "snail", "grinning face", "angry face", "skull", "robot", "ghost"),
    # Sky and things
    *("sun", "crescent moon", "rainbow", "red heart", "star", "house", "automobile", "airplane", "rocket", "sailboat"),
    *("umbrella", "key", "crown", "soccer ball"),
)

OTHERS = (
    # Faces
    *("beaming face with smiling eyes", "face with tears of joy", "smiling face with smiling eyes", "winking face"),
    *("smiling face with heart-eyes", "smiling face with sunglasses", "smiling face with halo", "nerd face"),
    *("face blowing a kiss", "kissing face", "face with tongue", "face with monocle", "star-struck", "neutral face"),
    *("expressionless face", "face with rolling eyes", "unamused face", "smirking face", "relieved face"),
    *("sleeping face", "face with medical mask", "nauseated face", "hot face", "cold face", "exploding head"),
    *("cowboy hat face", "crying face", "loudly crying face", "fearful face", "flushed face", "astonished face"),
    *("pleading face", "worried face", "zipper-mouth face", "clown face", "alien", "pile of poo", "jack-o-lantern"),
    *("smiling face with horns", "ogre", "goblin", "grinning cat", "smiling cat with heart-eyes", "crying cat"),
    # Animals
    *("cat", "black cat", "dog", "poodle", "fox", "wolf", "bear", "polar bear", "koala", "tiger", "lion", "leopard"),
    *("horse face", "horse", "unicorn", "zebra", "deer", "cow face", "cow", "pig", "ewe", "ram", "goat", "camel"),
    *("giraffe", "rhinoceros", "hippopotamus", "mouse face", "mouse", "hamster", "rabbit face", "rabbit", "chipmunk"),
    *("hedgehog", "bat", "monkey face", "monkey", "gorilla", "kangaroo", "badger", "raccoon", "skunk", "otter"),
    *("chicken", "rooster", "baby chick", "hatching chick", "bird", "dove", "eagle", "duck", "swan", "flamingo"),
    *("peacock", "parrot", "turkey", "crocodile", "lizard", "snake", "dragon face", "T-Rex", "whale", "spouting whale"),
    *("dolphin", "tropical fish", "blowfish", "shark", "octopus", "spiral shell", "crab", "lobster", "shrimp", "squid"),
    *("bug", "ant", "honeybee", "lady beetle", "cricket", "spider", "paw prints"),
    # Plants and food
    *("tulip", "blossom", "cherry blossom", "hibiscus", "bouquet", "potted plant", "evergreen tree", "deciduous tree"),
    *("herb", "four leaf clover", "maple leaf", "fallen leaf", "seedling", "melon", "tangerine", "pineapple", "mango"),
    *("green apple", "pear", "peach", "cherries", "blueberries", "kiwi fruit", "tomato", "avocado", "eggplant"),
    *("ear of corn", "hot pepper", "broccoli", "onion", "potato", "bread", "croissant", "cheese wedge", "french fries"),
    *("hot dog", "taco", "popcorn", "cookie", "shortcake", "cupcake", "lollipop", "candy", "soft ice cream"),
    *("honey pot", "wine glass", "beer mug", "glass of milk", "sushi", "rice ball", "fried shrimp"),
    # Sky
    *("full moon", "sun with face", "full moon face", "new moon face", "glowing star", "cloud", "sun behind cloud"),
    *("cloud with rain", "cloud with lightning", "snowflake", "snowman", "fire", "droplet", "high voltage"),
    *("ringed planet", "comet", "water wave", "volcano", "snow-capped mountain"),
    # Hearts
    *("orange heart", "yellow heart", "green heart", "blue heart", "purple heart", "black heart", "broken heart"),
    *("two hearts", "heart with arrow"),
    # Things
    *(
        "castle",
        "tent",
        "bicycle",
        "taxi",
        "bus",
        "fire engine",
        "tractor",
        "locomotive",
        "helicopter",
        "flying saucer",
    ),
    *("anchor", "balloon", "wrapped gift", "Christmas tree", "trophy", "basketball", "american football", "tennis"),
    *("guitar", "violin", "trumpet", "drum", "bell", "locked", "hammer", "axe", "bomb", "magnet", "scissors", "pencil"),
    *("paintbrush", "crayon", "closed book", "books", "envelope", "light bulb", "candle", "camera", "television"),
    *("telephone", "mobile phone", "laptop", "watch", "alarm clock", "hourglass done", "gem stone", "ring", "glasses"),
    *("top hat", "t-shirt", "dress", "backpack", "high-heeled shoe", "teddy bear", "game die", "artist palette"),
    *("money bag", "chair", "door", "globe showing Americas"),
)

SUBJECTS = (*COMMON, *OTHERS)
