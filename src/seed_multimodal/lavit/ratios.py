"""The six aspect ratios that LaVIT draws in; without torch, for programs that only name them."""

# Width to height: (height, width) in pixels. A U-Net of another size draws them in its own.
RATIOS = {"1:1": (1024, 1024), "4:3": (896, 1152), "3:2": (832, 1216), "16:9": (768, 1344), "2:3": (1216, 832),
          "3:4": (1152, 896)}
