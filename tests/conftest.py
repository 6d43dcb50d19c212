"Order of the tests."

LONG = ("test_training", "test_runs", "test_parallel", "test_coco")  # they start processes


def pytest_collection_modifyitems(items):
    "The long ones come first, so that two workers end at about the same time"
    items.sort(key=lambda item: item.path.stem not in LONG)
