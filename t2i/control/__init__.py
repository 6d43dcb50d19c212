"What steers a trained generator: masks, boxes, adapters"
