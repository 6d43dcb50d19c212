"CLIP, and a VQGAN that CLIP steers"
