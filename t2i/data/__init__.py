"Captioned images: the shapes world, its checker, and datasets from anywhere"
